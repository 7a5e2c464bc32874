"""Results of the analyses as tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    """A table, and figures of what stands in it: by name, what draws each into the file that it is given."""

    table: Table
    figures: dict[str, Callable[[Path], Any]]


def group_finding(attributions: Attributions, groups: Sequence[Group], name: str, what: str) -> Finding:
    """Groups of tokens, see `kept_sites`; `what` they are grouped by, in words."""
    sites = len(attributions.site_names)
    title = f"At how many of {sites} sites a token is kept, by {what} ({about(attributions)})"
    columns = ("group", "tokens", "texts", "sum of P(keep)", "its standard error", "sites kept", "error of that")
    data = [charts.Bar(f"{group.name} ({group.tokens:,})", group.expected, group.expected_error) for group in groups]
    label = f"expected number of sites that keep a token, of {sites}"
    return Finding(
        Table(name, title, columns, [tuple(group) for group in groups]),
        {name: lambda path: charts.bars(data, path, title=f"by {what}, {about(attributions)}", label=label)},
    )


def share_finding(attributions: Attributions, shares: Sequence[Share], name: str) -> Finding:
    """Regions of the texts by site, see `shares`."""
    sites = attributions.site_names
    rows: list[tuple[Cell, ...]] = [
        (site, *(float(values[at]) for share in shares for values in (share.expected, share.kept)))
        for at, site in enumerate(sites)
    ]
    columns = [f"{share.name}: {what}" for share in shares for what in ("P(keep)", "share kept")]
    lines = [charts.Line(share.name, share.kept.tolist()) for share in shares]
    # the answer where the model is right is nearly all of it, and would hide that curve
    lines = [line for line in lines if line.name != "answer, model right"]
    return Finding(
        Table(name, f"Share of the tokens that each site keeps ({about(attributions)})", ("site", *columns), rows),
        {
            name: lambda path: charts.curves(
                sites, lines, path, title=about(attributions), y_label="share of tokens kept", y_limits=(0, 1)
            )
        },
    )


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
    lowest = min(0.0, *(value for value in lines[0].values if value == value), 0.0)
    return Finding(
        Table(name, title, names, [tuple(None if cell != cell else cell for cell in row) for row in rows]),
        {name: lambda path: charts.curves(found.site_names, lines, path, title=title, y_limits=(lowest, 1))},
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
    rows = [
        (line.name, share, stays, nats)
        for line in found.lines
        for share, stays, nats in zip(found.shares, line.kept_prediction, line.divergence, strict=True)
    ]
    kept = [charts.Line(line.name, line.kept_prediction) for line in found.lines]
    divergence = [charts.Line(line.name, line.divergence) for line in found.lines]
    drawn: dict[str, tuple[list[charts.Line], str, tuple[float, float] | None]] = {
        f"{name}-kept": (kept, "prediction kept", (0.0, 1.0)),
        f"{name}-kl": (divergence, "KL (nats)", None),
    }

    def draw(lines: list[charts.Line], label: str, limits: tuple[float, float] | None) -> Callable[[Path], Any]:
        def to(path: Path) -> Any:
            x_label = "share of tokens masked, least important first"
            return charts.curves(
                found.shares, lines, path, title=where, x_label=x_label, y_label=label, y_limits=limits
            )

        return to

    columns = ("method", "share masked", "prediction kept", "KL (nats)")
    curves = Table(name, f"Faithfulness: {where}, the least important tokens first", columns, rows)
    parts = [f"{what} {share:g}" for what in ("comprehensiveness", "sufficiency") for share in found.rationales]
    scores: list[tuple[Cell, ...]] = [
        (line.name, line.mean_comprehensiveness, line.mean_sufficiency, *line.comprehensiveness, *line.sufficiency)
        for line in found.lines
    ]
    title = f"Comprehensiveness (high is good) and sufficiency (low is good): {where}"
    names = ("method", "comprehensiveness", "sufficiency", *parts)
    return [
        Finding(curves, {key: draw(*what) for key, what in drawn.items()}),
        Finding(Table(f"{name}-aopc", title, names, scores), {}),
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
                draw(folder / "figures" / f"{name}.{ending}")


def about(attributions: Attributions) -> str:
    """The method, and how many texts."""
    texts = f"{len(attributions):,} text{'' if len(attributions) == 1 else 's'}"
    return f"{attributions.method}, {attributions.masking} masking, {texts}"
