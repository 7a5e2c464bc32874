from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from diffmask_fast.attribution import Attributions
from diffmask_fast.report import figure

pytestmark = pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # depends on the machine's fonts


def images(made: Figure) -> list[AxesImage]:
    return [image for axes in made.axes for image in axes.get_images()]


def labels(made: Figure) -> list[str]:
    """The tokens under all panels, read off the figure."""
    return [label.get_text() for image in images(made) for label in image.axes.get_xticklabels()]


@pytest.mark.parametrize("i", range(3))
def test_every_token_and_value_is_in_the_heatmap_in_order(squad: Attributions, i: int) -> None:
    made = figure.heatmap(squad[i])
    drawn = np.concatenate([np.asarray(image.get_array()) for image in images(made)], axis=1)
    assert np.array_equal(drawn.astype(np.float32), squad[i].keep.T.numpy())
    assert labels(made) == squad[i].tokens


def test_the_embedding_is_at_the_bottom(squad: Attributions) -> None:
    axes = images(figure.heatmap(squad[0]))[0].axes
    assert axes is not None
    heights = {label.get_text(): label.get_position()[1] for label in axes.get_yticklabels()}
    bottom, top = axes.get_ylim()
    assert bottom < top
    assert heights["embedding"] == min(heights.values()) and heights["last"] == max(heights.values())


def test_a_long_text_is_wrapped_into_rows_of_nearly_the_same_length(squad: Attributions) -> None:
    lengths = [np.asarray(image.get_array()).shape[1] for image in images(figure.heatmap(squad[0]))]
    assert len(lengths) > 1 and max(lengths) <= figure.TOKENS_PER_ROW
    assert max(lengths) - min(lengths) < len(lengths)


def test_the_colour_scale_is_from_0_to_1_whatever_the_values(sst: Attributions) -> None:
    assert {image.get_clim() for image in images(figure.heatmap(sst[0]))} == {(0.0, 1.0)}


def test_sites_that_change_the_prediction_are_crossed(squad: Attributions) -> None:
    axes = images(figure.heatmap(squad[2]))[0].axes
    assert axes is not None
    crossed = [int(y) for line in axes.get_lines() for y in np.asarray(line.get_ydata())]
    assert crossed == (~squad.kept_prediction[2]).nonzero().flatten().tolist() != []


@pytest.mark.parametrize("token", ["$", "$x^2", "_", "\\frac{", "東京", "a\nb", "", " ", "👍", "{}", "%"])
def test_any_token_can_be_drawn(sst: Attributions, tmp_path: Path, token: str) -> None:
    sst.tokens[0][1] = token
    sst.original[0] = token
    figure.heatmap(sst[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_very_long_token_is_cut(sst: Attributions) -> None:
    sst.tokens[0][1] = "x" * 500
    assert labels(figure.heatmap(sst[0]))[1] == "x" * 15 + "…"


def test_everything_drawn_lies_within_the_figure(squad: Attributions) -> None:
    made = figure.heatmap(squad[0])
    box = made.get_tightbbox()
    width, height = made.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_chooses_the_format(sst: Attributions, tmp_path: Path, ending: str, magic: bytes) -> None:
    first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    figure.heatmap(sst[0], first)
    figure.by_site(sst, second)
    assert first.read_bytes().startswith(magic) and second.read_bytes().startswith(magic)
    assert set(tmp_path.iterdir()) == {first, second}


def test_an_ending_that_matplotlib_does_not_know_leaves_nothing_behind(sst: Attributions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        figure.heatmap(sst[0], tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_left_alone(sst: Attributions) -> None:
    before = "matplotlib.pyplot" in sys.modules
    figure.by_site(sst)
    figure.heatmap(sst[0])
    if before:
        import matplotlib.pyplot as plt

        assert plt.get_fignums() == []
    else:
        assert "matplotlib.pyplot" not in sys.modules


def test_curves_by_site_are_the_means_of_all_question_and_passage(squad: Attributions) -> None:
    lines = {line.get_label(): line.get_ydata() for line in figure.by_site(squad).axes[0].get_lines()}
    assert set(lines) == {"all tokens", "question", "passage"}
    for label, segment in (("all tokens", None), ("question", 1), ("passage", 2)):
        assert torch.equal(torch.tensor(np.asarray(lines[label]), dtype=torch.float32), squad.mean_keep(segment))


def test_single_texts_have_one_curve(sst: Attributions) -> None:
    assert [line.get_label() for line in figure.by_site(sst).axes[0].get_lines()] == ["all tokens"]


def test_one_text_and_all_texts_are_not_mixed_up(sst: Attributions) -> None:
    with pytest.raises(TypeError, match="index it first"):
        figure.heatmap(sst)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="slice it"):
        figure.by_site(sst[0])  # type: ignore[arg-type]
