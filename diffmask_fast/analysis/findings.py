"""Results of the analyses as tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffmask_fast.analysis.agreement import Agreement
from diffmask_fast.analysis.faithfulness import Faithfulness
from diffmask_fast.analysis.groups import Group, Share, largest_first
from diffmask_fast.analysis.squad_scores import Scores
from diffmask_fast.attribution import Attributions
from diffmask_fast.report import charts
from diffmask_fast.report.tables import Cell, Table, save_table


class Finding(NamedTuple):
    """A table, and figures of what stands in it: by name, what draws each into the file given as `path`."""

    table: Table
    figures: Mapping[str, Callable[..., Any]]


def group_finding(attributions: Attributions, groups: Sequence[Group], name: str, what: str) -> Finding:
    """Groups of tokens, see `kept_sites`; `what` they are grouped by, in words."""
    sites = len(attributions.site_names)
    title = f"At how many of {sites} sites a token is kept, by {what} ({about(attributions)})"
    columns = ("group", "tokens", "texts", "sum of P(keep)", "its standard error", "sites kept", "error of that")
    data = [charts.Bar(f"{group.name} ({group.tokens:,})", group.expected, group.expected_error) for group in groups]
    label = f"expected number of sites that keep a token, of {sites}"
    return Finding(
        Table(name, title, columns, [tuple(group) for group in groups]),
        {name: partial(charts.bars, data, title=f"by {what}, {about(attributions)}", label=label)},
    )


def share_findings(attributions: Attributions, shares: Sequence[Share], end: str = "") -> list[Finding]:
    """Regions of the texts by site, see `shares`: which share of their tokens is kept, and their mean P(keep).

    `end` is that of the names of both tables.
    """
    found = []
    for name, what in (("segments", "share of tokens kept"), ("segments-expected", "mean P(keep)")):
        values = [(share.name, (share.kept if name == "segments" else share.expected).tolist()) for share in shares]
        rows: list[tuple[Cell, ...]] = list(zip(attributions.site_names, *(row for _, row in values), strict=True))
        columns = ("site", *(f"{share.name} ({share.texts:,})" for share in shares))
        title = f"{what.capitalize()} by region (of so many texts) and site ({about(attributions)})"
        # the answer where the model is right is nearly all of it, and would hide that curve
        lines = [charts.Line(region, row) for region, row in values if region != "answer, model right"]
        draw = partial(
            charts.curves,
            attributions.site_names,
            lines,
            title=about(attributions),
            y_label=what,
            y_limits=(0.0, 1.0),
        )
        found.append(Finding(Table(f"{name}{end}", title, columns, rows), {f"{name}{end}": draw}))
    return found


def first_finding(attributions: Attributions, name: str) -> Finding:
    """How often the first token is the largest, see `largest_first`."""
    first = sorted({tokens[0] for tokens in attributions.tokens})
    which = first[0] if len(first) == 1 else "the first token"
    rows = list(zip(attributions.site_names, largest_first(attributions).tolist(), strict=True))
    title = f"Share of the texts in which {which} alone has the largest attribution ({about(attributions)})"
    return Finding(Table(name, title, ("site", "share of texts"), rows), {})


def agreement_finding(runs: Sequence[Attributions], found: Agreement, name: str) -> Finding:
    """Several runs on the same texts, see `agreement`."""
    columns = (found.spearman, found.defined, found.jaccard, found.same)
    rows = [tuple(row) for row in zip(found.site_names, *(column.tolist() for column in columns), strict=True)]
    names = ("site", "Spearman", "defined for", "Jaccard of kept tokens", "tokens decided alike")
    lines = [
        charts.Line("rank correlation (Spearman)", columns[0].tolist()),
        charts.Line("overlap of kept tokens (Jaccard)", columns[2].tolist()),
        charts.Line("tokens decided alike", columns[3].tolist()),
    ]
    title = f"Agreement of {len(runs)} runs, {about(runs[0])}"
    lowest = min([0.0, *(value for value in lines[0].values if value == value)])
    return Finding(
        Table(name, title, names, [tuple(None if cell != cell else cell for cell in row) for row in rows]),
        {name: partial(charts.curves, found.site_names, lines, title=title, y_limits=(lowest, 1.0))},
    )


def score_finding(attributions: Attributions, scores: Scores, name: str) -> Finding:
    """Exact match and F1 of the original answers and of each site's masked ones, see `squad_scores`."""
    rows: list[tuple[Cell, ...]] = [
        (site, *(100 * values[:, at].double().mean().item() for values in scores))
        for at, site in enumerate(("(whole text)", *attributions.site_names))
    ]
    title = f"Exact match and F1 in percent, with the tokens that each site keeps ({about(attributions)})"
    return Finding(Table(name, title, ("site", "exact match", "F1"), rows), {})


def faithfulness_findings(found: Faithfulness, name: str) -> list[Finding]:
    """The curves, and comprehensiveness and sufficiency, see `faithfulness`."""
    where = f"states at {found.site} replaced by their mean, {found.examples:,} examples"
    curves: list[tuple[Cell, ...]] = [
        (line.name, *values)
        for line in found.lines
        for values in zip(found.shares, line.kept_prediction, line.divergence, strict=True)
    ]
    rationales: list[tuple[Cell, ...]] = [
        (line.name, *values)
        for line in found.lines
        for values in zip(found.rationales, line.comprehensiveness, line.sufficiency, strict=True)
    ]
    means = [(line.name, line.mean_comprehensiveness, line.mean_sufficiency) for line in found.lines]
    measures = ("comprehensiveness", "sufficiency")
    what = f"comprehensiveness (high is good) and sufficiency (low is good): {where}"
    draw = partial(charts.curves, found.shares, title=where, x_label="share of tokens masked, least important first")
    kept = [charts.Line(line.name, line.kept_prediction) for line in found.lines]
    divergence = [charts.Line(line.name, line.divergence) for line in found.lines]
    figures: dict[str, Callable[..., Any]] = {
        f"{name}-kept": partial(draw, kept, y_label="prediction kept", y_limits=(0.0, 1.0)),
        f"{name}-kl": partial(draw, divergence, y_label="KL (nats)"),
    }
    title = f"Least important tokens masked first: {where}"
    return [
        Finding(Table(f"{name}-aopc", f"Mean {what}", ("method", *measures), means), {}),
        Finding(Table(f"{name}-rationales", what.capitalize(), ("method", "share", *measures), rationales), {}),
        Finding(Table(name, title, ("method", "share masked", "prediction kept", "KL (nats)"), curves), figures),
    ]


def write(findings: Iterable[Finding], folder: Path) -> None:
    """Each table as .md and .csv in `folder`/tables, each figure as .png and .pdf in `folder`/figures."""
    for part in ("tables", "figures"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for finding in findings:
        for ending in ("md", "csv"):
            save_table(finding.table, folder / "tables" / f"{finding.table.name}.{ending}")
        for name, draw in finding.figures.items():
            for ending in ("png", "pdf"):
                draw(path=folder / "figures" / f"{name}.{ending}")


def about(attributions: Attributions) -> str:
    """The method, and how many texts."""
    texts = f"{len(attributions):,} text{'' if len(attributions) == 1 else 's'}"
    return f"{attributions.method}, {attributions.masking} masking, {texts}"
