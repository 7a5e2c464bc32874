"""Bars and curves for print: what tables hold, drawn so that it can be read in grey and by colour-blind eyes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from diffmask_fast.report import printable
from diffmask_fast.report.canvas import fitted, panel, saved

# Colour, dash and marker all differ (Okabe and Ito's palette): any one of them is enough.
STYLES = (
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#0072b2", ":", "^"),
    ("#009e73", "-.", "D"),
    ("#cc79a7", (0, (5, 1)), "v"),
    ("#56b4e9", (0, (3, 1, 1, 1)), "P"),
    ("#e69f00", (0, (1, 1)), "X"),
    ("#666666", (0, (6, 2, 2, 2)), "*"),
)


class Bar(NamedTuple):
    """A bar: its `name`, its length `value`, and its standard `error` where it has one."""

    name: str
    value: float
    error: float | None = None


class Line(NamedTuple):
    """A curve: its name in the legend, and a value for each place on the x axis; NaN leaves a gap."""

    name: str
    values: Sequence[float]


def bars(
    data: Sequence[Bar], path: str | os.PathLike[str] | None = None, *, title: str = "", label: str = ""
) -> Figure:
    """Horizontal bars from the top down in the order given, with a line of one standard error to each side.

    Args:
        data: at least one bar.
        path: where to write the figure as well; it is replaced in one step.
        title, label: above the bars, and of their length.

    Raises:
        ValueError: no bar, or a length that is not finite.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not data or not all(math.isfinite(bar.value) for bar in data):
        raise ValueError(f"expected bars of finite length, at least one, got {list(data)}")
    figure, axes = panel((3.0, 0.17 * len(data)))
    places = range(len(data))
    errors = [bar.error if bar.error is not None and math.isfinite(bar.error) else 0.0 for bar in data]
    axes.barh(
        places,
        [bar.value for bar in data],
        xerr=errors if any(errors) else None,
        height=0.72,
        color="#56b4e9",
        edgecolor="#0b3d5c",
        linewidth=0.5,
        error_kw={"lw": 0.9, "capsize": 1.8, "ecolor": "#000000"},
    )
    axes.set_ylim(len(data) - 0.4, -0.6)
    axes.set_yticks(places, [printable(bar.name) for bar in data], fontsize=7, parse_math=False)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label, fontsize=8, parse_math=False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=8, loc="left", parse_math=False)
    return saved(fitted(figure, axes), path)


def curves(
    places: Sequence[str] | Sequence[float],
    lines: Sequence[Line],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Curves over the same places, which are names (sites) or numbers (shares).

    Args:
        places: of the x axis.
        lines: at least one, and no more than there are `STYLES`.
        path: where to write the figure as well; it is replaced in one step.
        title, x_label, y_label: in words.
        y_limits: of the y axis; by default what the curves take.

    Raises:
        ValueError: no line, too many to be told apart, or one that has not a value for each place.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not 1 <= len(lines) <= len(STYLES):
        raise ValueError(f"got {len(lines)} lines; expected 1 to {len(STYLES)}: more can't be told apart")
    for line in lines:
        if len(line.values) != len(places):
            raise ValueError(f"the line {line.name} has {len(line.values)} values for {len(places)} places")
    names = [printable(place) for place in places if isinstance(place, str)]
    figure, axes = panel((max(3.5, 0.24 * len(names) + 0.7), 1.9))
    numbers = range(len(places)) if names else [float(place) for place in places]
    for line, (colour, dash, marker) in zip(lines, STYLES, strict=False):
        axes.plot(
            numbers, line.values, linestyle=dash, color=colour, marker=marker, markersize=3.5, lw=1.3, label=line.name
        )
    if names:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_xlim(-0.5, len(names) - 0.5)
    if y_limits is not None:
        room = 0.02 * (y_limits[1] - y_limits[0])
        axes.set_ylim(y_limits[0] - room, y_limits[1] + room)
    axes.set_ylabel(y_label, fontsize=8, parse_math=False)
    axes.set_xlabel(x_label, fontsize=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        # a few find room between the curves, more stand beside them
        beside: dict[str, Any] = {} if len(lines) < 5 else {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)}
        for text in axes.legend(fontsize=7, frameon=False, handlelength=3.4, **beside).get_texts():
            text.set_parse_math(False)
    axes.set_title(title, fontsize=8, loc="left", parse_math=False)
    return saved(fitted(figure, axes), path)


def scatter(
    groups: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Figure:
    """Points in the plane, each group with its colour and marker.

    Args:
        groups: by name, the points; no more groups than there are `STYLES`.
        path: where to write the figure as well; it is replaced in one step.
        title, x_label, y_label: in words.

    Raises:
        ValueError: no group, or too many to be told apart.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if not 1 <= len(groups) <= len(STYLES):
        raise ValueError(f"got {len(groups)} groups; expected 1 to {len(STYLES)}: more can't be told apart")
    figure, axes = panel((3.5, 2.8))
    for (name, points), (colour, _, marker) in zip(groups.items(), STYLES, strict=False):
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter(x, y, s=7, marker=marker, color=colour, alpha=0.5, linewidths=0, label=name)
    axes.set_xlabel(x_label, fontsize=8, parse_math=False)
    axes.set_ylabel(y_label, fontsize=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=7, frameon=False).get_texts():
        text.set_parse_math(False)
    axes.set_title(title, fontsize=8, loc="left", parse_math=False)
    return saved(fitted(figure, axes), path)
