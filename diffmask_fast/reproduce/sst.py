"""The SST experiment: which words of a review a classifier needs, at which layer (De Cao et al. 2020, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffmask_fast import runs
from diffmask_fast.analysis.analyse import analyse
from diffmask_fast.analysis.findings import Finding, group_finding
from diffmask_fast.analysis.groups import kept_sites
from diffmask_fast.analysis.words import load_tagger, located, word_labels
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.data import Examples, encode
from diffmask_fast.models import load_for
from diffmask_fast.probes import MASKINGS
from diffmask_fast.report import figure
from diffmask_fast.report.tables import Cell, Table
from diffmask_fast.reproduce.parts import (
    BY_TEXT,
    attributions_of,
    by_every_method,
    faithful,
    method_sections,
    places,
    probe_finding,
)
from diffmask_fast.reproduce.report import Section, write_report
from diffmask_fast.reproduce.stages import Results, Stage, run_stages
from diffmask_fast.tasks import sst
from diffmask_fast.tasks.trees import Sentence

SEARCHES = ("erasure", "diffmask-per-example", "reinforce")
SEARCH_TOLERANCE = 0.1  # nats, as for the probes
SEARCHED_TO = 12  # tokens, special ones included
# sentences to train on, epochs of fine-tuning and of the probes, sentences explained by every method, and searched
SIZES: dict[bool, dict[str, Any]] = {
    False: {"limit": None, "fine_tune_epochs": None, "epochs": None, "explained": 200, "searched": 100},
    True: {"limit": 1_500, "fine_tune_epochs": 2, "epochs": 4, "explained": 40, "searched": 12},
}


def run(
    model_path: str, train: str, evaluate: str, out: Path, *, quick: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Fine-tune classifiers, train their probes, explain and search some sentences, and leave tables, figures and the
    page in `out`. What is there already is not made again.

    Args:
        model_path, train, evaluate: as in `sst.run`.
        out: the folder.
        quick: fewer sentences and epochs.
        quiet: no bar.

    Raises:
        FileNotFoundError, ValueError, ImportError: a file, a model or the tagger that is missing or wrong.

    Returns:
        The results of all stages by name.
    """
    config = {"reproduce": "sst", "model": model_path, "train": train, "eval": evaluate, "quick": quick}
    # what is wrong or missing is said before anything is made
    sst.read_sst(train)
    sst.read_sst(evaluate)
    sst.is_fitting(model_path, "encoder", 5)
    load_tagger()
    folder = runs.begin(out, config, resume=True)
    stages = [
        Stage("encoder", "encoder and its probes", 20, partial(probes, config, folder, "encoder")),
        Stage("gru", "GRU and its probes", 8, partial(probes, config, folder, "gru")),
        Stage("again", "a second probe, for stability", 8, partial(again, config, folder)),
        Stage("methods", "other methods", 8, partial(others, config, folder)),
        Stage("faithfulness", "faithfulness", 2, partial(faithfulness_of, config, folder)),
        Stage("search", "exact search", 8, partial(search, config, folder)),
    ]
    results = run_stages(folder, stages, quiet)
    write_report(folder, "SST: which words are needed, at which layer", sections(config, folder, results))
    runs.write_json(folder / runs.METRICS, results)
    return results


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What `sst.run` takes of the experiment's size."""
    return {name: SIZES[config["quick"]][name] for name in ("limit", "fine_tune_epochs", "epochs")}


def probes(config: dict[str, Any], folder: Path, architecture: str, _: Results) -> dict[str, Any]:
    return sst.run(
        *(config["model"], config["train"], config["eval"], folder / "runs" / architecture),
        architecture=architecture,
        resume=True,
        quiet=True,
        **sizes(config),
    )


def again(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    """The probe of hidden states once more, with another seed."""
    return sst.run(
        *(model_of(config, folder, "encoder"), config["train"], config["eval"], folder / "runs" / "encoder-again"),
        maskings=("hidden",),
        seed=1,
        resume=True,
        quiet=True,
        **sizes(config),
    )


def model_of(config: dict[str, Any], folder: Path, architecture: str) -> str:
    """Where the classifier is: in the run, or where it was given if it fits as it is."""
    tuned = folder / "runs" / architecture / "model"
    return str(tuned) if tuned.exists() else config["model"]


def encoded(config: dict[str, Any], folder: Path, architecture: str, sentences: Sequence[Sentence]) -> Any:
    """The classifier, and sentences as it takes them."""
    from transformers import AutoTokenizer

    path = model_of(config, folder, architecture)
    model = load_for(path)
    return model, encode(AutoTokenizer.from_pretrained(path), [sentence.text for sentence in sentences], model)


def measured_on(config: dict[str, Any]) -> list[Sentence]:
    return sst.read_sst(config["eval"], limit=SIZES[config["quick"]]["limit"])[0]


def some(config: dict[str, Any], folder: Path) -> tuple[Any, Examples, slice]:
    """The encoder, the sentences that all methods explain, and which they are of those measured on."""
    sentences, count = measured_on(config), SIZES[config["quick"]]["explained"]
    step = max(1, len(sentences) // count)
    chosen = slice(0, step * count, step)
    model, examples = encoded(config, folder, "encoder", sentences[chosen])
    return model, examples, chosen


def others(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    model, examples = some(config, folder)[:2]
    return by_every_method(model, examples, folder / "attributions", BY_TEXT, places(model), {})


def faithfulness_of(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    model, examples, chosen = some(config, folder)
    said = [attributions_of(folder, f"encoder/{masking}")[chosen] for masking in MASKINGS]
    return faithful(model, examples, folder / "attributions", said, places(model))


def search(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    """On sentences short enough: what is found against the smallest subset, for the GRU's embeddings.

    All replace what they drop by the mean state. With a baseline learned for the sentence, which can itself say what is
    to be predicted, fewer tokens would do than the smallest subset has.
    """
    sentences = measured_on(config)
    model, examples = encoded(config, folder, "gru", sentences)
    short = [i for i, length in enumerate(examples.lengths) if length <= SEARCHED_TO]
    examples = examples.select(short[: SIZES[config["quick"]]["searched"]])
    home = folder / "attributions" / "search"
    fixed = {"tolerance": SEARCH_TOLERANCE, "learn_baseline": False}
    options = {name: fixed for name in SEARCHES} | {"erasure": {"tolerance": SEARCH_TOLERANCE}}
    found = by_every_method(model, examples, home, SEARCHES, [0], options)
    kept = {name: [(one.keep[:, 0] > KEPT_ABOVE).sum().item() for one in load(home, name)] for name in found}
    smallest = torch.tensor(kept["erasure"])
    rows = {}
    for name, sizes_found in kept.items():
        held = load(home, name)
        holds = held.kept_prediction[:, 0] & (held.divergence[:, 0] <= SEARCH_TOLERANCE)
        excess = torch.tensor(sizes_found) - smallest
        rows[name] = {
            "optimal": ((excess == 0) & holds).float().mean().item(),
            "excess": excess[holds].float().mean().item() if holds.any() else None,
            "violated": (~holds).float().mean().item(),
            "size": sum(sizes_found) / len(sizes_found),
            "seconds": found[name]["seconds"] / len(sizes_found),
        }
    return {"sentences": len(examples), "methods": rows}


def load(home: Path, name: str) -> Attributions:
    return Attributions.load(home / f"{name}.safetensors")


def sections(config: dict[str, Any], folder: Path, results: Results) -> list[Section]:
    parts = []
    for architecture in ("encoder", "gru"):
        task = results[architecture]["task"]
        said = {masking: attributions_of(folder, f"{architecture}/{masking}") for masking in MASKINGS}
        found = []
        for masking, one in said.items():
            title = f"Probe of the {architecture}, {masking} masking, {len(one):,} evaluation sentences"
            name = f"probe-{architecture}-{masking}"
            found.append(probe_finding(results[architecture][masking], sst.COLUMNS, name, title))
        words = f"The classifier: accuracy {task['accuracy']:.3f}, macro F1 {task['macro_f1']:.3f}."
        note = "sampled: gates drawn as in training; the others: tokens kept whose P(keep) exceeds 0.5."
        captions = {
            f"A sentence, {masking} masking": (f"example-{architecture}-{masking}", partial(figure.heatmap, one[0]))
            for masking, one in said.items()
        }
        pages = [
            (f"All sentences, {masking} masking", f"runs/{architecture}/{masking}/report.html") for masking in MASKINGS
        ]
        parts.append(Section(architecture.capitalize(), [words, note], found, captions, pages))
    parts.append(Section("By part of speech and sentiment, and stability", [], analyses(config, folder)))
    parts += method_sections(results)
    parts.append(Section("Against exact search", [], [search_finding(results["search"])]))
    return parts


def analyses(config: dict[str, Any], folder: Path) -> list[Finding]:
    """Of the encoder's hidden states: by part of speech, by the treebank's label of the word, and of two seeds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_of(config, folder, "encoder"))
    sentences = measured_on(config)
    texts = [sentence.text for sentence in sentences]
    runs_found = [attributions_of(folder, f"{name}/hidden") for name in ("encoder", "encoder-again")]
    found = analyse(runs_found, texts, tokenizer)
    one = runs_found[0]
    names = [[str(label) for label in sentence.word_labels] for sentence in sentences]
    words = [sentence.words for sentence in sentences]
    labels = word_labels(one, located(one, texts, tokenizer), words, names)
    return [*found, group_finding(one, kept_sites(one, labels), "word-sentiment", "the treebank's label of the word")]


def search_finding(result: dict[str, Any]) -> Finding:
    rows: list[tuple[Cell, ...]] = [
        (name, row["optimal"], row["excess"], row["violated"], row["size"], row["seconds"])
        for name, row in result["methods"].items()
    ]
    columns = (
        "method",
        "smallest subset found",
        "mean excess",
        "constraint violated",
        "mean size",
        "seconds a sentence",
    )
    title = (
        f"GRU, word embeddings, {result['sentences']} sentences of at most {SEARCHED_TO} tokens: the same class at a "
        f"KL of at most {SEARCH_TOLERANCE} nats, dropped embeddings replaced by their mean"
    )
    return Finding(Table("search", title, columns, rows), {})
