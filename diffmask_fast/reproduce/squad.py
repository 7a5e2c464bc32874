"""The SQuAD experiment: which words of question and passage, at which layer (De Cao et al. 2020, section 4.3)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffmask_fast import runs
from diffmask_fast.analysis.analyse import analyse
from diffmask_fast.analysis.findings import Finding
from diffmask_fast.analysis.words import load_tagger
from diffmask_fast.data import encode
from diffmask_fast.models import load_for
from diffmask_fast.probes import MASKINGS
from diffmask_fast.report import figure
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
from diffmask_fast.tasks import squad

# of questions to train on and to measure on, and of those explained by every method
SIZES = {False: (None, None, 64), True: (1_200, 120, 12)}
STEPS = {False: {}, True: {"schulz": {"steps": 30}, "guan": {"steps": 30}, "integrated-gradients": {"steps": 10}}}


def run(
    model_path: str, train: str, evaluate: str, out: Path, *, quick: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train probes of inputs and of hidden states, explain some questions by every other method, and leave tables,
    figures and the page in `out`. What is there already is not made again.

    Args:
        model_path, train, evaluate: as in `squad.run`.
        out: the folder.
        quick: fewer questions of all kinds.
        quiet: no bar.

    Raises:
        FileNotFoundError, ValueError, ImportError: a file, a model or the tagger that is missing or wrong.

    Returns:
        The results of all stages by name.
    """
    config = {"reproduce": "squad", "model": model_path, "train": train, "eval": evaluate, "quick": quick}
    # what is wrong or missing is said before anything is made
    squad.read_squad(train)
    squad.squad_answers(evaluate)
    load_for(model_path, "QuestionAnswering")
    load_tagger()
    folder = runs.begin(out, config, resume=True)
    minutes = {"input": 22, "hidden": 18, "methods": 25, "faithfulness": 8}
    stages = [
        *(Stage(masking, f"probe, {masking} masking", minutes[masking], partial(probe, config, folder, masking))
          for masking in MASKINGS),
        Stage("methods", "other methods", minutes["methods"], partial(others, config, folder)),
        Stage("faithfulness", "faithfulness", minutes["faithfulness"], partial(faithfulness_of, config, folder)),
    ]  # fmt: skip
    results = run_stages(folder, stages, quiet)
    write_report(folder, "SQuAD: which words are needed, at which layer", sections(config, folder, results))
    runs.write_json(folder / runs.METRICS, results)
    return results


def probe(config: dict[str, Any], folder: Path, masking: str, _: Results) -> dict[str, Any]:
    limit, eval_limit = SIZES[config["quick"]][:2]
    return squad.run(
        *(config["model"], config["train"], config["eval"], folder / "runs" / masking),
        masking=masking,
        limit=limit,
        eval_limit=eval_limit,
        resume=True,
        quiet=True,
    )


def some(config: dict[str, Any]) -> tuple[Any, Any, int]:
    """The model, the first questions that all methods explain, encoded, and how many they are."""
    from transformers import AutoTokenizer

    model, count = load_for(config["model"], "QuestionAnswering"), SIZES[config["quick"]][2]
    pairs = squad.read_squad(config["eval"], "validation")[:count]
    return model, encode(AutoTokenizer.from_pretrained(config["model"]), pairs, model), len(pairs)


def others(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    model, examples = some(config)[:2]
    home = folder / "attributions"
    return by_every_method(model, examples, home, BY_TEXT, places(model), STEPS[config["quick"]])


def faithfulness_of(config: dict[str, Any], folder: Path, _: Results) -> dict[str, Any]:
    model, examples, count = some(config)
    probes = [attributions_of(folder, masking)[:count] for masking in MASKINGS]
    return faithful(model, examples, folder / "attributions", probes, places(model))


def sections(config: dict[str, Any], folder: Path, results: Results) -> list[Section]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    probes = {masking: attributions_of(folder, masking) for masking in MASKINGS}
    count = len(probes["input"])
    pairs = squad.read_squad(config["eval"], "validation")[:count]
    answers = squad.squad_answers(config["eval"], "validation")[:count]
    parts = []
    for masking, said in probes.items():
        title = f"Probe, {masking} masking, {count:,} evaluation questions"
        found = [probe_finding(results[masking], squad.COLUMNS, f"probe-{masking}", title)]
        found += [renamed(one, masking) for one in analyse([said], pairs, tokenizer, answers)]
        parts.append(
            Section(
                f"{masking.capitalize()} masking",
                [
                    "sampled: gates drawn as in training; the others: tokens kept whose P(keep) exceeds 0.5. Exact "
                    "match and F1 are of the masked predictions against the gold answers.",
                ],
                found,
                {"The first question, by site": (f"example-{masking}", partial(figure.heatmap, said[0]))},
                [("All questions", f"runs/{masking}/report.html")],
            )
        )
    return [*parts, *method_sections(results)]


def renamed(finding: Finding, end: str) -> Finding:
    """The same in files of another name."""
    table = replace(finding.table, name=f"{finding.table.name}-{end}")
    return Finding(table, {f"{name}-{end}": draw for name, draw in finding.figures.items()})
