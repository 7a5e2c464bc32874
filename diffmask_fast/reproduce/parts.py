"""What several experiments have: the same texts by every method, how faithful that is, and how both are shown."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffmask_fast.analysis.faithfulness import Faithfulness, Line, faithfulness
from diffmask_fast.analysis.findings import Finding, faithfulness_findings
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.methods import METHODS
from diffmask_fast.data import Examples
from diffmask_fast.moments import state_moments
from diffmask_fast.report.tables import Table
from diffmask_fast.reproduce.report import Section
from diffmask_fast.reproduce.stages import Results
from diffmask_fast.sites import sites_of

# those of `METHODS` that explain any text in the time of an experiment
BY_TEXT = ("attention", "integrated-gradients", "leave-one-out", "schulz", "guan")

Options = Mapping[str, Mapping[str, Any]]


def places(model: Any) -> list[int]:
    """The sites at which single texts are explained: the embedding, and the input of the middle layer."""
    return [0, len(sites_of(model)) // 2]


def attributions_of(folder: Path, name: str) -> Attributions:
    """What the run of that name left."""
    return Attributions.load(folder / "runs" / name / "attributions.safetensors")


def by_every_method(
    model: Any, examples: Examples, home: Path, methods: Sequence[str], sites: Sequence[int], options: Options
) -> dict[str, Any]:
    """Explain the examples by each method, at those of `sites` that it can explain, and keep what it says in `home`.

    What is there already is not made again. `options` are those of a method where they are not its defaults.

    Returns:
        By method: `seconds`, and by site the mean `kl` and `kept_prediction` with the tokens that it keeps.
    """
    home.mkdir(parents=True, exist_ok=True)
    moments = state_moments(model, examples, sites)
    there = sites_of(model)
    measured = {}
    for method in methods:
        file = home / f"{method}.safetensors"
        own = [site for site in sites if not METHODS[method].layers_only or there[site].side == "input"]
        if not own:
            continue
        if not file.exists():
            start = time.monotonic()
            found = attribute(model, examples, method=method, sites=own, moments=moments, **options.get(method, {}))
            seconds = time.monotonic() - start
            found.meta["seconds"] = round(seconds, 2)
            found.save(file)
        found = Attributions.load(file)
        kept = found.kept_prediction.float().mean(0).tolist()
        measured[method] = {
            "seconds": found.meta["seconds"],
            "sites": {
                name: {"kl": kl, "kept_prediction": share}
                for name, kl, share in zip(found.site_names, found.divergence.mean(0).tolist(), kept, strict=True)
            },
        }
    return measured


def faithful(
    model: Any, examples: Examples, home: Path, probes: Sequence[Attributions], sites: Sequence[int]
) -> dict[str, Any]:
    """Faithfulness at each of the sites of the methods kept in `home` and of the probes that mask there."""
    names = [site.name for site in sites_of(model)]
    said = [Attributions.load(file) for file in sorted(home.glob("*.safetensors"))]
    result = {}
    for site in sites:
        there = [one for one in said if names[site] in one.site_names]
        there += [probe for probe in probes if probe.masking == "hidden" or site == 0]
        result[names[site]] = asdict(faithfulness(model, examples, there, site=site))
    return result


def method_sections(results: Results) -> list[Section]:
    """The sections of the stages "methods" and "faithfulness"."""
    curves = {site: read_faithfulness(found) for site, found in results["faithfulness"].items()}
    explained = next(iter(curves.values())).examples
    shown = [
        one
        for site, found in curves.items()
        for one in faithfulness_findings(found, f"faithfulness-{site.replace(' ', '-')}")
    ]
    text = "Tokens are masked in each method's order, the least important first."
    return [
        Section("Other methods", [], [method_finding(results["methods"], explained, "methods")]),
        Section("Faithfulness", [text], shown),
    ]


def read_faithfulness(result: Mapping[str, Any]) -> Faithfulness:
    """What `asdict` made of it, as it was."""
    return Faithfulness(**{**result, "lines": tuple(Line(**line) for line in result["lines"])})


def method_finding(measured: Mapping[str, Any], texts: int, name: str) -> Finding:
    """What `by_every_method` measured."""
    rows = [
        (method, site, row["kl"], row["kept_prediction"], found["seconds"])
        for method, found in measured.items()
        for site, row in found["sites"].items()
    ]
    columns = ("method", "site", "KL (nats)", "prediction kept", "seconds, all sites")
    title = f"Each text by itself: the tokens above half of the largest attribution kept, {texts:,} texts"
    return Finding(Table(name, title, columns, rows), {})


def probe_finding(metrics: Mapping[str, Any], columns: Sequence[str], name: str, title: str) -> Finding:
    """By site, what was measured of a probe."""
    rows = [(site, *(row[column] for column in columns)) for site, row in metrics["sites"].items()]
    return Finding(Table(name, title, ("site", *columns), rows), {})
