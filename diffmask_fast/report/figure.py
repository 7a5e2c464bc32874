"""Attributions as figures for print: the heatmap of one text, and the share of kept tokens by site.

Figures are made without pyplot, so nothing is shown, kept open, or shared between threads. The ending of the
path chooses the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import math
import os

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from diffmask_fast.attribution import SEGMENT_NAMES, Attribution, Attributions
from diffmask_fast.report import has_two_segments, marks_beginnings, printable, require_many, require_one, without_mark
from diffmask_fast.report.canvas import blank, saved
from diffmask_fast.report.charts import Line, curves

COLOURS = "cividis"  # the same order to colour-blind eyes and on a greyscale printer
TOKENS_PER_ROW = 48
LONGEST_TOKEN = 16  # characters; longer ones are cut so that one URL does not squeeze every row
_CELL, _LINE = 0.2, 0.14  # inches, the width of a token and the height of a site
_LETTER = 0.07  # inches, more than the mean letter takes at 7 or 8 points
_HEAD = 0.6  # inches, for the two lines above the cells


def heatmap(attribution: Attribution, path: str | os.PathLike[str] | None = None) -> Figure:
    """P(keep) of every token (x) at every site (y, the embedding at the bottom), as in the paper's figures.

    Long texts are wrapped into several rows of the same scale. A cross at the right end marks a site
    whose masked prediction is no longer the original one.

    Args:
        attribution: one text, as in `attributions[0]`.
        path: where to write the figure as well; it is replaced in one step.

    Raises:
        TypeError: `attribution` is not one text.
        FileNotFoundError: the folder of `path` does not exist.

    Source: De Cao et al., EMNLP 2020, figures 1 and 4.
    """
    require_one(attribution)
    rows = math.ceil(len(attribution) / TOKENS_PER_ROW)
    width = math.ceil(len(attribution) / rows)  # balanced: no last row of two tokens
    words = attribution.tokens
    if marks_beginnings(attribution):
        words = [without_mark(token) for token in words]
    shown = [_cut(printable(word), LONGEST_TOKEN) for word in words]
    # in inches; axes are placed by hand so that every cell is the same size in every row and figure
    left = _LETTER * max(len(name) for name in attribution.site_names) + 0.3
    below = _LETTER * max(map(len, shown)) + 0.15
    height = _LINE * len(attribution.site_names)
    size = (max(left + _CELL * width + 0.3, 4.0), _HEAD + rows * (height + below))
    figure = blank(size)
    for row in range(rows):
        columns = slice(row * width, min((row + 1) * width, len(attribution)))
        bottom = size[1] - _HEAD - height - row * (height + below)
        box = (left, bottom, _CELL * (columns.stop - columns.start), height)
        _panel(_axes(figure, box), attribution, shown, columns)
    _head(figure, attribution, left)
    return saved(figure, path)


def by_site(attributions: Attributions, path: str | os.PathLike[str] | None = None) -> Figure:
    """The mean P(keep) at every site, over all tokens, and where there are two segments for each of them.

    Args:
        attributions: at least one text.
        path: where to write the figure as well; it is replaced in one step.

    Raises:
        TypeError, ValueError: `attributions` is not `Attributions`, or has no text.
        FileNotFoundError: the folder of `path` does not exist.

    Source: De Cao et al., EMNLP 2020, figure 5.
    """
    require_many(attributions)
    lines = [Line("all tokens", attributions.mean_keep().tolist())]
    if has_two_segments(attributions):
        lines += [Line(SEGMENT_NAMES[segment], attributions.mean_keep(segment).tolist()) for segment in (1, 2)]
    texts = f"{len(attributions):,} text{'s' if len(attributions) > 1 else ''}"
    title = f"{attributions.masking} masking, {texts}"
    return curves(attributions.site_names, lines, path, title=title, y_label="mean P(keep)", y_limits=(0, 1))


def _head(figure: Figure, attribution: Attribution, left: float) -> None:
    """The prediction, and below it the legend."""
    width, height = figure.get_size_inches()
    room = int((width - left) / _LETTER) - len("prediction: ")
    title = f"prediction: {_cut(printable(attribution.original), max(room, 8))}"
    figure.text(left / width, 1 - 0.18 / height, title, fontsize=8, va="center", parse_math=False)
    line = 1 - 0.4 / height
    bar = _axes(figure, (left + 0.6, height - 0.45, 0.9, 0.1))
    figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), cax=bar, orientation="horizontal", ticks=[])
    figure.text(left / width, line, "P(keep)  0", fontsize=7, va="center")
    after = "1" if attribution.kept_prediction.all() else "1        \N{MULTIPLICATION SIGN} masked prediction differs"
    figure.text((left + 1.55) / width, line, after, fontsize=7, va="center")


def _panel(axes: Axes, attribution: Attribution, shown: list[str], columns: slice) -> None:
    values = attribution.keep[columns].T.tolist()
    axes.imshow(values, origin="lower", aspect="auto", cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    names = [printable(name) for name in attribution.site_names]
    # parse_math=False: a token such as $ is a token, not the start of a formula
    axes.set_xticks(range(len(shown[columns])), shown[columns], rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
    axes.tick_params(length=1.5, pad=1.5)
    axes.spines[:].set_linewidth(0.5)
    changed = [i for i, kept in enumerate(attribution.kept_prediction.tolist()) if not kept]
    if changed:
        axes.autoscale(False)
        edge = [len(shown[columns]) - 0.05] * len(changed)
        axes.plot(edge, changed, "x", color="black", markersize=3, clip_on=False)


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    width, height = figure.get_size_inches()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
