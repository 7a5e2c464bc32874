from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffmask_fast.attribution import Attributions
from diffmask_fast.report import piece, pieces, printable, terminal

ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def bare_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "500")  # wide enough that nothing wraps


def shown(
    attribution: Any, site: Any = None, colour: bool = False, monkeypatch: pytest.MonkeyPatch | None = None
) -> str:
    if colour and monkeypatch:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", "truecolor")
    file = io.StringIO()
    terminal.show(attribution, site, file)
    return file.getvalue()


def braced(line: str) -> list[bool]:
    """For every character outside the braces themselves, whether it stands inside them."""
    depth, out = 0, []
    for c in line:
        if c in "{}":
            depth += 1 if c == "{" else -1
        elif c != " ":
            out.append(depth == 1)
    return out


@pytest.mark.parametrize("site", range(8))
def test_without_colour_braces_hold_exactly_the_dropped_tokens(sst: Attributions, site: int) -> None:
    text = sst[2]
    line = next(line for line in shown(text, site).splitlines() if "mess" in line)
    expected = []
    for token, keep in zip(text.tokens, text.keep[:, site].tolist(), strict=True):
        expected += [keep <= 0.5] * len(piece(token)[1])
    assert braced(line) == expected


def test_a_pipe_gets_no_escape_codes(sst: Attributions) -> None:
    assert "\x1b" not in shown(sst[0])


def test_no_color_is_obeyed_on_a_terminal(sst: Attributions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(sst[0], 7, colour=True, monkeypatch=monkeypatch)
    assert "{" in out and not re.search(r"\x1b\[[0-9;]*[34]8;", out)


def test_with_colour_the_words_stand_as_they_are(sst: Attributions, monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(sst[2], 4, colour=True, monkeypatch=monkeypatch)
    assert "48;2;" in out
    assert "[CLS] an unfunctional mess of a film that wastes a fine cast . [SEP]" in ANSI.sub("", out)


@pytest.mark.parametrize("keep", torch.linspace(0, 1, 101).tolist())
def test_every_colour_can_be_read(keep: float) -> None:
    def luminance(rgb: tuple[int, int, int]) -> float:  # WCAG 2.2, relative luminance
        parts = [x / 255 / 12.92 if x / 255 <= 0.04045 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    style = terminal._style(keep)
    assert style.color and style.bgcolor
    low, high = sorted((luminance(tuple(style.color.triplet)), luminance(tuple(style.bgcolor.triplet))))  # type: ignore[arg-type]
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def test_without_a_site_all_sites_are_listed_and_the_last_is_shown(squad: Attributions) -> None:
    out = shown(squad[0])
    for i, name in enumerate(squad.site_names):
        assert re.search(rf"{i} {name}\b", out)
    assert "last: 8 of 96 tokens kept" in out


def test_prediction_before_and_after_and_the_kl_are_shown(squad: Attributions) -> None:
    out = shown(squad[2], 13)
    assert "whole text  € 4 . 2 million" in out
    assert "masked      the game" in out
    assert f"{squad[2].divergence[13]:.3f} nats, prediction changed" in out


def test_an_empty_prediction_is_said_to_be_empty(sst: Attributions) -> None:
    sst.original[0] = ""
    assert "whole text  (empty)" in shown(sst[0], 0)


def test_a_token_cannot_steer_the_terminal(sst: Attributions) -> None:
    sst.tokens[0][1] = "\x1b[2J\u202e\n[red]"
    sst.original[0] = "\x1b]0;owned\x07"
    out = shown(sst[0])
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert r"\x1b[2J\u202e\n[red]" in out  # neither an escape code nor rich's markup


def test_a_stream_without_unicode_gets_its_characters_spelled_out(squad: Attributions) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    terminal.show(squad[2], file=file)
    terminal.summary(squad, file=file)
    file.flush()
    assert rb"\u6771" in raw.getvalue()


@pytest.mark.parametrize("site", [-1, 8, "last", True, 1.0])
def test_a_site_that_does_not_exist_lists_those_that_do(sst: Attributions, site: object) -> None:
    with pytest.raises(ValueError, match="the sites are 0 embedding, 1 layer 0"):
        shown(sst[0], site)


def test_all_texts_at_once_are_refused(sst: Attributions) -> None:
    with pytest.raises(TypeError, match=r"one text, got Attributions; index it first"):
        shown(sst)


def test_the_summary_has_a_row_of_means_for_every_site(squad: Attributions) -> None:
    file = io.StringIO()
    terminal.summary(squad, file)
    lines = file.getvalue().splitlines()
    for i, name in enumerate(squad.site_names):
        row = next(line for line in lines if re.match(rf"\W*{i} {name}\b", line))
        numbers = [float(x) for x in re.findall(r"\d+\.\d+", row)]
        keep, divergence = squad.mean_keep()[i], squad.divergence[:, i].mean()
        same = 100 * squad.kept_prediction[:, i].float().mean()
        parts = (squad.mean_keep(1)[i], squad.mean_keep(2)[i])
        # printed with three digits, the percentage with one
        assert numbers == pytest.approx([float(x) for x in (keep, divergence, same, *parts)], abs=0.0501)
        assert numbers[:2] + numbers[3:] == pytest.approx([float(x) for x in (keep, divergence, *parts)], abs=0.000501)


def test_the_summary_of_single_texts_has_no_segments(sst: Attributions) -> None:
    file = io.StringIO()
    terminal.summary(sst, file)
    assert "question" not in file.getvalue()


def test_the_summary_fits_eighty_columns(squad: Attributions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = io.StringIO()
    terminal.summary(squad, file)
    assert "…" not in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) <= 80


def test_the_summary_of_nothing_is_an_error(sst: Attributions) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        terminal.summary(sst[:0])


def test_word_pieces_are_told_from_words_that_look_like_them() -> None:
    assert piece("##ing") == (True, "ing")
    assert piece("##") == (False, "##")
    assert piece("#ing") == (False, "#ing")


@pytest.mark.parametrize("mark", ["Ġ", "▁"])
def test_where_words_begin_with_a_mark_what_has_none_goes_on_with_one(mark: str, sst: Attributions) -> None:
    tokens = ["<s>", f"{mark}un", "believ", "able", mark, f"{mark}film", "</s>"]
    one = replace(
        sst[:1],
        tokens=[tokens],
        keep=torch.rand(7, len(sst.site_names), generator=torch.Generator().manual_seed(0)),
        segments=torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.int8),
    )[0]
    assert pieces(one) == [
        (False, "<s>"),
        (False, "un"),
        (True, "believ"),
        (True, "able"),
        (False, mark),
        (False, "film"),
        (False, "</s>"),
    ]
    file = io.StringIO()
    terminal.show(one, file=file)
    assert "unbelievable" in file.getvalue().replace("{", "").replace("}", "")


def test_a_letter_that_looks_like_a_mark_is_none_among_word_pieces(sst: Attributions) -> None:
    tokens = ["[CLS]", "Ġ", "##or", "##ġ", "lives", "[SEP]"]
    one = replace(
        sst[:1],
        tokens=[tokens],
        keep=torch.ones(6, len(sst.site_names)),
        segments=torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.int8),
    )[0]
    assert pieces(one) == [piece(token) for token in tokens]


def test_printable_leaves_ordinary_writing_alone() -> None:
    assert printable("Straße, 東京, 👍 $_\\") == "Straße, 東京, 👍 $_\\"
