"""What every figure starts from and ends with: a canvas of its own, and a file that is written whole or not at all.

Figures are made without pyplot, so nothing is shown, kept open, or shared between threads. The ending of the
path chooses the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import os
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import BboxBase

from diffmask_fast.files import replacing

# Tried in this order for the scripts that matplotlib's own font lacks.
_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Micro Hei", "Microsoft YaHei")
_RIM = 0.06  # inches around everything
_MORE_FONTS = ("Hiragino Sans", "PingFang SC", "Malgun Gothic", "Arial Unicode MS", "Noto Sans")


def blank(size: tuple[float, float]) -> Figure:
    """An empty figure, `size` in inches."""
    figure = Figure(figsize=size, dpi=150)
    FigureCanvasAgg(figure)
    return figure


def panel(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of one panel, which is `size` inches large without its labels; `fitted` gives it the room for those."""
    figure = blank(size)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def fitted(figure: Figure, axes: Axes) -> Figure:
    """The figure as large as its panel and all that is written around it, with a narrow rim."""
    inner, whole = (box.transformed(figure.dpi_scale_trans.inverted()) for box in _extents(axes))
    left, below = inner.x0 - whole.x0 + _RIM, inner.y0 - whole.y0 + _RIM
    width, height = whole.width + 2 * _RIM, whole.height + 2 * _RIM
    figure.set_size_inches(width, height)
    axes.set_position((left / width, below / height, inner.width / width, inner.height / height))
    return figure


def _extents(axes: Axes) -> tuple[BboxBase, BboxBase]:
    whole = axes.get_tightbbox()
    assert whole is not None
    return axes.get_window_extent(), whole


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, also written to `path` if there is one."""
    installed = set(font_manager.get_font_names())
    family = ["DejaVu Sans", *(font for font in (*_FONTS, *_MORE_FONTS) if font in installed)]
    texts: Any = figure.findobj(lambda artist: hasattr(artist, "set_fontfamily"))
    for text in texts:
        text.set_fontfamily(family)
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, metadata=_undated(os.fspath(path)))
    return figure


def _undated(path: str) -> dict[str, None]:
    """Without the time in it, the same attribution gives the same file."""
    return {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(os.path.splitext(path)[1].lower(), {})
