"""The toy experiment: every method at both sites against the known truth (De Cao et al. 2020, section 4.1, table 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffmask_fast import runs
from diffmask_fast.analysis.findings import Finding
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.explain import explain as explain_by_probe
from diffmask_fast.attribution.methods import METHODS
from diffmask_fast.data import Examples
from diffmask_fast.report import charts, figure
from diffmask_fast.report.tables import Table
from diffmask_fast.reproduce.report import Section, write_report
from diffmask_fast.reproduce.stages import Results, Stage, run_stages
from diffmask_fast.sites import patch
from diffmask_fast.tasks import toy

SEEDS, QUICK_SEEDS = 5, 1
METHODS_HERE = [name for name, method in METHODS.items() if not method.layers_only]
OPTIONS = {name: {"tolerance": toy.RECIPES["steady"].tolerance} for name in ("diffmask-per-example", "reinforce")}
PROBE = "diffmask"
ONE_MULTIPLIER = "diffmask, one multiplier for all sites"
FIXED_BASELINE = "diffmask-per-example, fixed baseline"


def run(out: Path, *, quick: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train networks and probes for the seeds 0 to 4 (`quick`: 0 alone), explain the validation sequences by every
    method, and leave tables, figures and the page in `out`. What is there already is not made again.

    Returns:
        By seed, method and site what `toy.distances` returns; None stands for what is not finite.
    """
    folder = runs.begin(out, {"reproduce": "toy", "quick": quick}, resume=True)
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    stages = [
        stage
        for seed in seeds
        for stage in (
            Stage(f"probe-{seed}", f"network and probe, seed {seed}", 0.5, partial(train, folder, seed)),
            Stage(f"methods-{seed}", f"all methods, seed {seed}", 1.5, partial(explain, folder, seed)),
            Stage(f"ablations-{seed}", f"ablations, seed {seed}", 0.8, partial(ablate, folder, seed)),
        )
    ]
    results = run_stages(folder, stages, quiet)
    metrics = {str(seed): {**results[f"methods-{seed}"], **results[f"ablations-{seed}"]} for seed in seeds}
    write_report(folder, "Toy task: attributions against the truth", sections(folder, metrics))
    runs.write_json(folder / runs.METRICS, metrics)
    return metrics


def train(folder: Path, seed: int, _: Results) -> dict[str, Any]:
    metrics = toy.run(folder / "runs" / f"seed-{seed}", seed=seed, resume=True, quiet=True)
    return {"task_accuracy": metrics["task_accuracy"]}


def explain(folder: Path, seed: int, _: Results) -> dict[str, Any]:
    """Distances of all methods and of the probe; their attributions are kept in the seed's folder."""
    home = folder / "runs" / f"seed-{seed}"
    training, validation = toy.split(toy.toy_examples(toy.EXAMPLES, seed))
    said = toy.explained(toy.load_model(home), training, validation, METHODS_HERE, OPTIONS)
    for name, found in said.items():
        found.save(home / f"{name}.safetensors")
    said[PROBE] = Attributions.load(home / "attributions.safetensors")
    return {name: finite_distances(found, validation) for name, found in said.items()}


def ablate(folder: Path, seed: int, _: Results) -> dict[str, Any]:
    """Distances without a multiplier for each site, and without amortisation and learned baseline; without amortisation
    alone is one of the methods."""
    home = folder / "runs" / f"seed-{seed}"
    training, validation = toy.split(toy.toy_examples(toy.EXAMPLES, seed))
    model = toy.load_model(home)
    shared = replace(toy.RECIPES["steady"], multiplier="shared")
    probe = toy.trained_probe(model, training, shared, home / "one-multiplier", seed=seed, resume=True, quiet=True)
    name = "diffmask-per-example"
    options = {name: {**OPTIONS[name], "learn_baseline": False}}
    said = {
        ONE_MULTIPLIER: explain_by_probe(model, probe, validation, batch_size=toy.VALIDATION),
        FIXED_BASELINE: toy.explained(model, training, validation, [name], options)[name],
    }
    return {name: finite_distances(found, validation) for name, found in said.items()}


def finite_distances(found: Attributions, validation: Examples) -> dict[str, dict[str, float | None]]:
    """As JSON can hold them: None stands for what is not finite."""
    return {
        site: {key: value if math.isfinite(value) else None for key, value in row.items()}
        for site, row in toy.distances(found, validation).items()
    }


def sections(folder: Path, metrics: dict[str, Any]) -> list[Section]:
    home = folder / "runs" / "seed-0"
    validation = toy.split(toy.toy_examples(toy.EXAMPLES, 0))[1]
    return [
        Section(
            f"Distance to the truth, {len(metrics)} seed{'s' * (len(metrics) > 1)}",
            [
                "At the hidden state only the digits of the query matter, and all of them alike; at the embedding the "
                "network can't know yet, so every position does. Attributions are normalised. D_KL(truth || method) is "
                "infinite where a method gives nothing to a digit that is needed.",
            ],
            [Finding(distance_table(site, metrics), {}) for site in ("hidden", "embedding")],
            links=[("All sequences, by the probe, seed 0", "runs/seed-0/report.html")],
        ),
        Section(
            "One sequence, by every method",
            [f"The query is {' and '.join(map(str, validation[example(home)]['query']))}."],
            pictures={
                "Attribution to the hidden state, normalised to the largest": (
                    "example",
                    partial(figure.heatmap, by_method(home, example(home))),
                )
            },
        ),
        Section(
            "What the network's hidden states look like",
            ["Each point is the hidden state of a digit in a validation sequence of seed 0: two numbers."],
            pictures={"Hidden states, by the digit's part in the query": ("states", partial(draw_states, home))},
        ),
    ]


def distance_table(site: str, metrics: dict[str, Any]) -> Table:
    """Mean over seeds, and the smallest and largest of them; the best method first."""
    rows: list[tuple[str, list[float]]] = []
    for method in next(iter(metrics.values())):
        found = [seed[method][site] for seed in metrics.values()]
        cells: list[float] = []
        for key in ("kl", "js"):
            values = [math.inf if row[key] is None else row[key] for row in found]
            cells += [sum(values) / len(values), min(values), max(values)]
        rows.append((method, cells))
    columns = ("method", "D_KL", "smallest", "largest", "D_JS", "smallest", "largest")
    title = f"{site} state: distance to the truth in nats, mean over seeds, and the smallest and largest seed"
    ordered = sorted(rows, key=lambda row: row[1][3])
    return Table(f"distance-{site}", title, columns, [(method, *cells) for method, cells in ordered])


def example(home: Path) -> int:
    """A sequence of seed 0 to show: the longest, and of these the first."""
    lengths = Attributions.load(home / "attributions.safetensors").lengths
    return int(lengths.argmax())


def by_method(home: Path, number: int) -> Any:
    """One sequence with the methods in the places of the sites."""
    names: Sequence[str] = [PROBE, *METHODS_HERE]
    files = ["attributions", *METHODS_HERE]
    texts = [Attributions.load(home / f"{name}.safetensors")[number] for name in files]
    at = [text.site_names.index("hidden") for text in texts]
    keep = torch.stack([text.keep[:, site] / text.keep[:, site].max() for text, site in zip(texts, at, strict=True)], 1)
    pairs = list(zip(texts, at, strict=True))
    joined = Attributions(
        tokens=[texts[0].tokens],
        site_names=tuple(names),
        keep=keep.nan_to_num(0.0),
        segments=texts[0].segments,
        divergence=torch.stack([text.divergence[site] for text, site in pairs])[None],
        original=[texts[0].original],
        masked=[[text.masked[site] for text, site in pairs]],
        kept_prediction=torch.stack([text.kept_prediction[site] for text, site in pairs])[None],
        method="all",
        masking="hidden",
    )
    return joined[0]


def draw_states(home: Path, path: Path) -> Any:
    validation = toy.split(toy.toy_examples(toy.EXAMPLES, 0))[1]
    inputs = validation.collate([validation[i] for i in range(len(validation))])
    with torch.no_grad(), patch(toy.load_model(home)) as patched:
        states = patched.run(inputs, capture=(1,)).states[1]
    first, second = (inputs["input_ids"] == inputs["query"][:, i : i + 1] for i in range(2))
    real = inputs["attention_mask"].bool()
    parts = {"first of the query": first, "second of the query": second, "another digit": ~first & ~second}
    groups = {name: [tuple(point) for point in states[part & real].tolist()] for name, part in parts.items()}
    return charts.scatter(groups, path, x_label="first hidden number", y_label="second hidden number")
