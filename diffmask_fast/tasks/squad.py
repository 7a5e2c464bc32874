"""Question answering on SQuAD: at which layer does the model know which words of question and passage it needs?

Input or hidden masking over all sites of any Hugging Face model with a span head (De Cao et al. 2020, section 4.3).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from diffmask_fast import processes, runs
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import Examples, encode
from diffmask_fast.models import load_for
from diffmask_fast.probes import save_probe
from diffmask_fast.training.backbone import multiplies_bfloat16
from diffmask_fast.training.recipe import INPUT, PUBLISHED, Recipe, recipe_named

_PUBLISHED = replace(PUBLISHED, warmup_steps=1200, epochs=1)
RECIPES = {
    "input": {
        "steady": replace(INPUT, epochs=5.0),
        "decided": replace(INPUT, margin=0.8, initial_margin=None, lowest_aim=0.5, below="decided", epochs=4.0),
        "published": _PUBLISHED,
    },
    "hidden": {"steady": Recipe(), "published": _PUBLISHED},
}
# what is shown of each site's metrics
COLUMNS = ("sampled_kl", "sampled_open", "kl", "open", "open_question", "open_passage", "kept_prediction")


class Answer(NamedTuple):
    """A gold answer: its first character in the passage, and its text."""

    start: int
    text: str


def read_squad(source: str | os.PathLike[str], split: str = "train") -> list[tuple[str, str]]:
    """(question, passage) pairs from a SQuAD JSON file, or from a data set of that name on the hub.

    Raises:
        FileNotFoundError: neither a file nor, with the `datasets` package, a data set of the hub.
        ValueError: JSON that isn't SQuAD; the message names the place.
    """
    if os.path.exists(source):
        return [(question, passage) for _, question, passage, _ in _from_file(source)]
    rows = _from_hub(str(source), split)
    return list(zip((q.strip() for q in rows["question"]), rows["context"], strict=True))


def squad_answers(source: str | os.PathLike[str], split: str = "validation") -> list[list[Answer]]:
    """The gold answers of each question, in the order of `read_squad`; at least one each.

    Raises:
        FileNotFoundError: as `read_squad`.
        ValueError: as `read_squad`; a question without an answer, or one that the passage doesn't hold where it says.
    """
    if os.path.exists(source):
        questions = [(place, passage, qa.get("answers")) for place, _, passage, qa in _from_file(source)]
    else:
        rows = _from_hub(str(source), split)
        given = rows["answers"] if "answers" in rows.column_names else [None] * len(rows)
        questions = []
        for number, (passage, found) in enumerate(zip(rows["context"], given, strict=True)):
            pairs = found and zip(found["text"], found["answer_start"], strict=True)
            listed = pairs and [{"text": text, "answer_start": start} for text, start in pairs]
            questions.append((f"row {number}", passage, listed))
    return [_answers(source, place, passage, found) for place, passage, found in questions]


def _answers(source: str | os.PathLike[str], place: str, passage: str, found: Any) -> list[Answer]:
    answers = []
    try:
        for answer in found or ():
            start, text = answer["answer_start"], answer["text"]
            if not text or start < 0 or passage[start : start + len(text)] != text:
                raise TypeError(f"the passage does not hold {text!r} at character {start}")
            answers.append(Answer(start, text))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{source}: at {place}: {error!r}; expected "answers": [{{"text": ..., "answer_start": ...}}]'
        ) from error
    if not answers:
        raise ValueError(f"{source}: at {place}: the question has no answer; expected SQuAD 1.1, where each has one")
    return answers


def _from_file(source: str | os.PathLike[str]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """For each question of a SQuAD file its place, itself, the passage, and what else there is."""
    try:
        with open(source, encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not JSON ({error}); expected a SQuAD file") from error
    questions, place = [], "data"
    try:
        for i, article in enumerate(content["data"]):
            place = f"data[{i}]"
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{i}].paragraphs[{j}]"
                passage = paragraph["context"]
                if not isinstance(passage, str):
                    raise TypeError(f"the context is {type(passage).__name__}")
                for k, qa in enumerate(paragraph["qas"]):
                    if not (qa["question"].strip() and passage.strip()):
                        raise TypeError(f"the question or the context of qas[{k}] is empty")
                    questions.append((f"{place}.qas[{k}]", qa["question"].strip(), passage, qa))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is JSON but not SQuAD: at {place}: {error!r}; expected "
            '{"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ...}]}]}]}'
        ) from error
    if not questions:
        raise ValueError(f"{source} holds no question")
    return questions


def _from_hub(name: str, split: str) -> Any:
    """The rows of a data set."""
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{name}: there is no such file; to load a data set of that name from the hub, pip install datasets"
        ) from None
    rows = datasets.load_dataset(name, split=split)
    if not {"question", "context"} <= set(rows.column_names):
        raise ValueError(f"{name} has the columns {rows.column_names}; expected SQuAD's question and context")
    return rows


def windowed(examples: Examples) -> tuple[int, int]:
    """How many questions are longer with their passages than the model takes, and how many windows those became."""
    windows = Counter(window.text for window in examples.windows or ())
    several = [count for count in windows.values() if count > 1]
    return len(several), sum(several)


def _encoded(source: str | os.PathLike[str], tokenizer: Any, pairs: list[tuple[str, str]], model: Any) -> Examples:
    """The questions of a file; what is wrong with one of them names the file too."""
    try:
        return encode(tokenizer, pairs, model)
    except ValueError as error:
        raise ValueError(f"{source}, questions counted from 0: {error}") from error


def run(
    model_path: str,
    train: str | os.PathLike[str],
    evaluate: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    masking: str = "input",
    seed: int = 0,
    recipe: str = "steady",
    resume: bool = False,
    bf16: bool | None = None,
    limit: int | None = None,
    eval_limit: int | None = None,
    epochs: float | None = None,
    compile: bool = False,
    checkpoint_layers: bool = False,
    tokens_per_batch: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a probe over all sites and measure it on the evaluation questions.

    Args:
        model_path: folder or hub name of a question-answering model.
        train, evaluate: SQuAD files or hub data sets.
        out: folder for everything that the run leaves.
        masking: "input" or "hidden".
        seed: of everything drawn.
        recipe: a name in `RECIPES[masking]`.
        resume: go on with the run in `out`.
        bf16: run the frozen model in bfloat16 while training; it is measured in float32. None: where the device
            has instructions for it, see `multiplies_bfloat16`.
        limit: use only so many questions of each file.
        eval_limit: of the evaluation file another number of them.
        epochs: instead of the recipe's.
        compile, checkpoint_layers, tokens_per_batch: as in `train_probe`.
        quiet: no bars.

    Returns:
        The metrics: `sites.<name>` and `overall` with what `attribution_metrics` and `sampled_metrics` measure,
        `questions`, `seconds` (all of it, this time). `questions` counts those of `train` and `eval`, and for both
        how many of them were `windowed`, being longer than the model takes, and how many `windows` those became.
    """
    start = time.monotonic()
    if masking not in RECIPES:
        raise ValueError(f"masking is {masking!r}; expected one of {', '.join(RECIPES)}")
    chosen = recipe_named(recipe, RECIPES[masking])
    if epochs is not None:
        chosen = replace(chosen, epochs=epochs)
    config = {
        "task": "squad",
        "model": str(model_path),
        "train": str(train),
        "eval": str(evaluate),
        "masking": masking,
        "seed": seed,
    }
    eval_limit = limit if eval_limit is None else eval_limit
    bf16 = multiplies_bfloat16() if bf16 is None else bf16
    config |= {
        "limit": limit,
        "eval_limit": eval_limit,
        "bf16": bf16,
        "compile": compile,
        "tokens_per_batch": tokens_per_batch,
    }
    config |= {"recipe": recipe, **chosen.to_dict()}
    pairs, eval_pairs = read_squad(train)[:limit], read_squad(evaluate, "validation")[:eval_limit]
    folder = runs.begin(out, config, resume)
    if (folder / runs.METRICS).exists():
        return runs.read_json(folder / runs.METRICS)
    from transformers import AutoTokenizer

    from diffmask_fast.training.evaluation import attribution_metrics, by_site, sampled_metrics
    from diffmask_fast.training.trainer import fresh_probe, train_probe

    model = load_for(model_path, "QuestionAnswering")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    training = _encoded(train, tokenizer, pairs, model)
    evaluation = _encoded(evaluate, tokenizer, eval_pairs, model)
    (cut, windows), (eval_cut, eval_windows) = windowed(training), windowed(evaluation)
    if cut + eval_cut and not quiet:
        print(
            "longer than the model takes, read in overlapping windows: "
            f"training questions {cut} ({windows} windows), evaluation questions {eval_cut} ({eval_windows} windows)"
        )
    torch.manual_seed(seed)
    probe = fresh_probe(model, training, chosen, masking, mask_token=tokenizer.mask_token_id)
    train_probe(
        model,
        probe,
        training,
        chosen,
        folder / "checkpoints",
        seed=seed,
        bf16=bf16,
        compile=compile,
        checkpoint_layers=checkpoint_layers,
        tokens_per_batch=tokens_per_batch,
        resume=resume,
        quiet=quiet,
    )
    probe.eval()
    meta = {
        "task": "squad",
        "model": str(model_path),
        "seed": seed,
        "recipe": recipe,
        "versions": runs.versions(),
    }
    bar = processes.is_first() and not quiet
    attributions = explain(model, probe, evaluation, meta=meta, show_progress=bar, shared=True)
    sampled = sampled_metrics(model, probe, evaluation, seed=seed, show_progress=bar, shared=True)
    metrics = {
        **by_site(attributions.site_names, sampled, attribution_metrics(attributions)),
        "questions": {
            "train": len(pairs),
            "eval": len(eval_pairs),
            "windowed": [cut, eval_cut],
            "windows": [windows, eval_windows],
        },
        "seconds": round(time.monotonic() - start, 1),
    }
    if processes.is_first():
        save_probe(probe, folder / "probe.safetensors", meta)
        runs.finish(folder, metrics, attributions, "SQuAD: which words are needed")
    processes.wait()
    return metrics
