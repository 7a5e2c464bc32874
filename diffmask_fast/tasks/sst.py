"""Sentiment of film reviews (SST): which words does a classifier still need, at which layer?

A classifier of five classes or two is fine-tuned, where there is none, and probes of inputs and of hidden states are
trained over all its sites (De Cao et al. 2020, section 4.2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from diffmask_fast import processes, runs
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import encode
from diffmask_fast.models import config_of, load_for, new_classifier
from diffmask_fast.probes import MASKINGS, save_probe
from diffmask_fast.tasks.classifiers import (
    FINE_TUNING,
    FineTuning,
    classification_metrics,
    fine_tune,
    save_classifier,
)
from diffmask_fast.tasks.trees import CLASS_NAMES, Sentence, in_classes, read_trees
from diffmask_fast.training.backbone import multiplies_bfloat16
from diffmask_fast.training.recipe import INPUT, PUBLISHED, Recipe, recipe_named

ARCHITECTURES = {"encoder": "ForSequenceClassification", "gru": "GRUClassifier"}  # and what names such a class

# what is shown of each site's metrics
COLUMNS = ("sampled_kl", "sampled_open", "kl", "open", "kept_prediction", "accuracy", "macro_f1")
_PUBLISHED = replace(PUBLISHED, tolerance=0.1, warmup_steps=1200, epochs=300, batch_size=64)
RECIPES = {
    # a pull by share leaves alone what is all open: so tight a tolerance allows that, and all or nothing was kept then
    "input": {
        "steady": replace(INPUT, tolerance=0.1, pull_by="gate", epochs=3.0, batch_size=16),
        "published": _PUBLISHED,
    },
    "hidden": {"steady": Recipe(tolerance=0.1, epochs=2, batch_size=32), "published": _PUBLISHED},
}


def read_sst(path: str | os.PathLike[str], classes: int = 5, limit: int | None = None) -> tuple[list[Sentence], int]:
    """The sentences that a run uses, in their order, and how many were left out for being neutral.

    Args:
        path: a file of trees, see `read_trees`.
        classes: 5, or 2: without the neutral ones.
        limit: take so many of them, evenly spaced: neighbours in the treebank have similar labels.

    Raises:
        FileNotFoundError, ValueError: see `read_trees` and `in_classes`; a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected 1 or more sentences, or None for all")
    trees = read_trees(path)
    sentences = in_classes(trees, classes)
    count = min(limit or len(sentences), len(sentences))
    return [sentences[i * len(sentences) // count] for i in range(count)], len(trees) - len(sentences)


def is_fitting(model_path: str, architecture: str, classes: int) -> bool:
    """Whether a model is a classifier of that architecture and number of classes, to be explained as it is.

    Raises:
        FileNotFoundError, ValueError: there is no such model; a GRU classifier that does not fit.
    """
    config = config_of(model_path)
    name = (config.architectures or [""])[0]
    if name.endswith(ARCHITECTURES[architecture]) and config.num_labels == classes:
        return True
    if name == ARCHITECTURES["gru"]:
        raise ValueError(
            f"{model_path} holds a GRU classifier of {config.num_labels} classes: explain it with --architecture gru "
            f"--classes {config.num_labels}, or give an encoder"
        )
    return False


def classifier(
    model_path: str,
    sentences: Sequence[Sentence],
    folder: Path,
    settings: FineTuning,
    config: dict[str, Any],
    quiet: bool,
) -> str:
    """Where the classifier to explain is: `model_path`, if it fits, or `folder`/model, fine-tuned if it isn't there."""
    architecture, classes, seed = config["architecture"], config["classes"], config["seed"]
    if is_fitting(model_path, architecture, classes):
        return model_path
    tuned = folder / "model"
    if not tuned.exists():
        from transformers import AutoTokenizer

        if processes.is_first() and not quiet:
            print(f"{model_path} is no {architecture} classifier of {classes} classes: fine-tuning one, {settings}")
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        torch.manual_seed(seed)
        model = new_classifier(model_path, CLASS_NAMES[classes], architecture)
        examples = encode(tokenizer, [sentence.text for sentence in sentences], model)
        labels = [sentence.label for sentence in sentences]
        fine_tune(model, examples, labels, settings, folder / "checkpoints", seed=seed, quiet=quiet)
        save_classifier(model, tokenizer, tuned)
    return str(tuned)


def run(
    model_path: str,
    train: str | os.PathLike[str],
    evaluate: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    architecture: str = "encoder",
    classes: int = 5,
    maskings: Sequence[str] = MASKINGS,
    seed: int = 0,
    recipe: str = "steady",
    resume: bool = False,
    bf16: bool | None = None,
    limit: int | None = None,
    epochs: float | None = None,
    fine_tune_epochs: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune a classifier, if it is none yet, train a probe of each masking, and measure on the evaluation trees.

    Args:
        model_path: folder or hub name of a Hugging Face encoder. With a head for as many classes it is explained as it
            is, its classes being in the order from negative to positive; else it is fine-tuned first.
        train, evaluate: files of trees, see `read_trees`.
        out: folder for everything that the run leaves: `model`, if it was fine-tuned, and a folder for each masking.
        architecture: "encoder", or "gru": a GRU on the encoder's word embeddings, which stay as they are.
        classes: 5, or 2: without the neutral sentences.
        maskings: "input", "hidden", or both.
        seed: of everything drawn.
        recipe: a name in `RECIPES[masking]`.
        resume: go on with the run in `out`.
        bf16: run the frozen encoder in bfloat16 while probes are trained; it is measured in float32. None:
            where the device has instructions for it, see `multiplies_bfloat16`. A GRU never is.
        limit: use only so many sentences of each file, evenly spaced.
        epochs: of the probes, instead of the recipe's.
        fine_tune_epochs: of the classifier, instead of those of `FINE_TUNING`.
        quiet: no bars.

    Returns:
        The metrics: `task` with the classifier's `accuracy` and `macro_f1` on the evaluation sentences; for each
        masking `sites.<name>` and `overall` with what `attribution_metrics` and `sampled_metrics` measure, and
        `accuracy` and `macro_f1` with only the tokens whose P(keep) exceeds 0.5; `sentences`, those of `train` and
        `eval`, and how many `neutral` ones were left out of both; `seconds` (all of it, this time).

    Raises:
        FileNotFoundError, ValueError: files that are missing or no trees, a model that is none or does not fit, an
            unknown name among the options; nothing is left then.
        FileExistsError: see `runs.begin`.
    """
    start = time.monotonic()
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    if isinstance(maskings, str) or not maskings or not set(maskings) <= set(MASKINGS):
        raise ValueError(f"maskings is {maskings!r}; expected one or both of {', '.join(MASKINGS)}, in a list")
    recipes = {masking: recipe_named(recipe, RECIPES[masking]) for masking in maskings}
    if epochs is not None:
        recipes = {masking: replace(chosen, epochs=epochs) for masking, chosen in recipes.items()}
    settings = FINE_TUNING[architecture]
    settings = settings if fine_tune_epochs is None else replace(settings, epochs=fine_tune_epochs)
    bf16 = multiplies_bfloat16() if bf16 is None else bf16
    (sentences, neutral), (eval_sentences, eval_neutral) = (
        read_sst(path, classes, limit) for path in (train, evaluate)
    )
    config = {
        **{"task": "sst", "model": str(model_path), "train": str(train), "eval": str(evaluate), "seed": seed},
        **{"architecture": architecture, "classes": classes, "maskings": list(maskings), "limit": limit, "bf16": bf16},
        **{"fine_tuning": asdict(settings), "recipe": recipe},
        "recipes": {masking: chosen.to_dict() for masking, chosen in recipes.items()},
    }
    folder = runs.begin(out, config, resume)
    if (folder / runs.METRICS).exists():
        return runs.read_json(folder / runs.METRICS)
    if processes.is_first() and not quiet:
        left_out = f"; {neutral} and {eval_neutral} neutral ones left out" if classes == 2 else ""
        print(f"sentences: {len(sentences)} to train on, {len(eval_sentences)} to measure on{left_out}")
    path = classifier(str(model_path), sentences, folder, settings, config, quiet)
    measured = {
        masking: train_and_measure(path, sentences, eval_sentences, folder / masking, chosen, config, resume, quiet)
        for masking, chosen in recipes.items()
    }
    metrics = {
        "task": next(iter(measured.values()))["task"],
        **measured,
        "sentences": {
            "train": len(sentences),
            "eval": len(eval_sentences),
            "neutral": [neutral, eval_neutral] if classes == 2 else [0, 0],
        },
        "seconds": round(time.monotonic() - start, 1),
    }
    if processes.is_first():
        runs.write_json(folder / runs.METRICS, metrics)
    processes.wait()
    return metrics


def train_and_measure(
    path: str,
    sentences: Sequence[Sentence],
    eval_sentences: Sequence[Sentence],
    folder: Path,
    recipe: Recipe,
    config: dict[str, Any],
    resume: bool,
    quiet: bool,
) -> dict[str, Any]:
    """The probe of the masking that `folder` is named after, trained and measured: its metrics, see `run`, and `task`.
    What is there already is read."""
    if (folder / runs.METRICS).exists():
        return runs.read_json(folder / runs.METRICS)
    from transformers import AutoTokenizer

    from diffmask_fast.training.evaluation import attribution_metrics, by_site, sampled_metrics
    from diffmask_fast.training.trainer import fresh_probe, train_probe

    masking, seed = folder.name, config["seed"]
    model, tokenizer = load_for(path), AutoTokenizer.from_pretrained(path)
    training, evaluation = (
        encode(tokenizer, [sentence.text for sentence in part], model) for part in (sentences, eval_sentences)
    )
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    probe = fresh_probe(model, training, recipe, masking, mask_token=tokenizer.mask_token_id)
    train_probe(
        *(model, probe, training, recipe, folder / "checkpoints"),
        seed=seed,
        bf16=config["bf16"] and config["architecture"] == "encoder",
        predictions=folder.parent / "checkpoints",
        resume=resume,
        quiet=quiet,
    )
    probe.eval()
    meta = {"task": "sst", "model": path, "seed": seed, "recipe": config["recipe"], "versions": runs.versions()}
    bar = processes.is_first() and not quiet
    attributions = explain(model, probe, evaluation, meta=meta, show_progress=bar, shared=True)
    sampled = sampled_metrics(model, probe, evaluation, seed=seed, show_progress=bar, shared=True)
    names = model.config.id2label
    truth = [names[sentence.label] for sentence in eval_sentences]
    masked = [classification_metrics(truth, predicted) for predicted in zip(*attributions.masked, strict=True)]
    metrics = {
        "task": classification_metrics(truth, attributions.original),
        **by_site(attributions.site_names, sampled, attribution_metrics(attributions), masked),
    }
    if processes.is_first():
        save_probe(probe, folder / "probe.safetensors", meta)
        runs.finish(folder, metrics, attributions, f"SST, {masking} masking: which words are needed")
    processes.wait()
    return metrics
