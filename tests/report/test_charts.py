from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from diffmask_fast.report.charts import STYLES, Bar, Line, bars, curves


def test_bars_stand_in_order_with_their_names_lengths_and_errors() -> None:
    axes = bars([Bar("NOUN", 3.0, 0.5), Bar("$x_1$", 1.0), Bar("[CLS]", 2.0, 0.25)]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["NOUN", "$x_1$", "[CLS]"]
    assert [patch.get_width() for patch in axes.patches] == [3.0, 1.0, 2.0]
    below, above = axes.get_ylim()
    assert below > above  # the first one at the top
    (lines,) = axes.collections
    spans = [(segment[0][0], segment[1][0]) for segment in lines.get_segments()]
    assert spans == [(2.5, 3.5), (1.0, 1.0), (1.75, 2.25)]


def test_curves_hold_their_values_and_differ_in_colour_dash_and_marker() -> None:
    made = [Line(f"line {i}", [i, i + 1.0, float("nan")]) for i in range(len(STYLES))]
    drawn = curves((0.0, 0.25, 1.0), made).axes[0].get_lines()
    for line, own in zip(drawn, made, strict=True):
        assert np.array_equal(line.get_xdata(), [0.0, 0.25, 1.0])
        assert np.array_equal(line.get_ydata(), own.values, equal_nan=True)
    for different in ([line.get_color() for line in drawn], [line.get_marker() for line in drawn]):
        assert len(set(different)) == len(STYLES)
    assert len({style[1] for style in STYLES}) == len(STYLES)


def test_names_of_places_and_lines_are_no_formulas() -> None:
    axes = curves(["a_$1$", "b"], [Line("$x$", [0, 1]), Line("y", [1, 0])], title="$t$").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a_$1$", "b"]
    texts = [text for text in axes.findobj(Text) if "$" in text.get_text()]
    assert {text.get_text() for text in texts} == {"$t$", "$x$", "a_$1$"}
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_figures_are_written_whole_in_the_format_of_the_ending(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"figure.{ending}"
    bars([Bar("a", 1.0, 0.1)], path, title="t", label="l")
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(begins) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("longest", [3, 40])
def test_everything_drawn_lies_within_the_figure(longest: int) -> None:
    name = "W" * longest
    for figure in (
        bars([Bar(name, 1.0, 0.1)] * 3, title="a title", label="sites"),
        curves([name] * 20, [Line("line", [0.5] * 20)], title="a title", x_label="site", y_label="share"),
        curves((0, 0.5, 1.0), [Line("line", [0.5] * 3)], title="a title", x_label="share", y_label="KL (nats)"),
    ):
        box, whole = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole[0] and box.y1 <= whole[1]


def test_what_can_not_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        bars([])
    with pytest.raises(ValueError, match="finite length"):
        bars([Bar("a", float("nan"))])
    with pytest.raises(ValueError, match="got 9 lines; expected 1 to 8"):
        curves((0, 1), [Line("a", (0, 1))] * 9)
    with pytest.raises(ValueError, match="the line a has 1 values for 2 places"):
        curves((0, 1), [Line("a", (0,))])
    with pytest.raises(FileNotFoundError, match="the folder"):
        bars([Bar("a", 1.0)], tmp_path / "no" / "figure.png")
