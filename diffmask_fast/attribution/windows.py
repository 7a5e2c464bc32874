"""One result for a text that was read in windows; `explain` says by which rule.

A text that was not cut is its own only window, and comes out of all this to the bit as it went in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmask_fast.data import Examples, Window
from diffmask_fast.predictions import AtPositions, Kind, Own, Span


def whole_texts(examples: Examples) -> list[list[int]]:
    """The numbers of each text's windows, text after text.

    Raises:
        ValueError: windows that do not hold the whole of their text, or do not follow one another.
    """
    if examples.windows is None:
        return [[i] for i in range(len(examples))]
    texts: list[list[int]] = []
    before = None
    for i, window in enumerate(examples.windows):
        # a piece that does not lie further on begins the text again: the same text may have been selected twice
        if before is None or window.text != before.text or window.piece.start <= before.piece.start:
            texts.append([])
        texts[-1].append(i)
        before = window
    for numbers in texts:
        windows = [examples.windows[i] for i in numbers]
        if {token for window in windows for token in window.piece} != set(windows[0].cut):
            raise ValueError(
                f"text {windows[0].text} is not whole here: give all its windows, one behind the other as encode does"
            )
    return texts


def merge(examples: Examples, numbers: list[int], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `say` says about the windows of one text, as what it would say about the text.

    Args:
        examples: holds the windows.
        numbers: their numbers, in order.
        rows: what was said about each.
    """
    if examples.windows is None:
        length = len(examples.tokens[numbers[0]])
        windows = [Window(numbers[0], length, range(length), range(length))]
    else:
        windows = [examples.windows[i] for i in numbers]
    tokens, segments = [""] * windows[0].length, [0] * windows[0].length
    for i, window in zip(numbers, windows, strict=True):
        for at, token, segment in zip(window.positions, examples.tokens[i], examples.segments[i], strict=True):
            tokens[at], segments[at] = token, segment
    answers, words = merge_answers(examples, numbers, windows, rows)
    return {
        "tokens": tokens,
        "segments": segments,
        "keep": merge_keep(windows, [row["keep"] for row in rows]),
        "scores": merge_scores(windows, rows),
        "details": {name: torch.stack([row["details"][name] for row in rows]).mean(0) for name in rows[0]["details"]},
        "divergence": torch.stack([row["divergence"] for row in rows if row["asked"]]).mean(0),
        "original": words[0],
        "masked": words[1:],
        "kept_prediction": kind_in(examples, rows).same(answers[1:], answers[:1]),
    }


def merge_scores(windows: list[Window], rows: list[dict[str, Any]]) -> Tensor | None:
    """(T, S) scores in the whole text, by the rule of `merge_keep`; the largest is that of the largest size."""
    if rows[0]["scores"] is None:
        return None
    if len(rows) == 1:
        return rows[0]["scores"]
    above, below = (merge_keep(windows, [(sign * row["scores"]).clamp(min=0) for row in rows]) for sign in (1, -1))
    return torch.where(above >= below, above, -below)


def merge_keep(windows: list[Window], keeps: list[Tensor]) -> Tensor:
    """(T, S) P(keep) in the whole text, from the (T_w, S) of each window.

    Of the part that was cut, a token has its value from the window in which it has the most tokens of that part on its
    scarcer side, the earlier one where two have as many. What stands in every window has the largest of its values.
    """
    merged = keeps[0].new_zeros(windows[0].length, keeps[0].shape[1])
    owners, (cut, *_) = owners_of(windows), (window.cut for window in windows)
    for number, (window, keep) in enumerate(zip(windows, keeps, strict=True)):
        at = torch.tensor(window.positions)
        shared_out = (at >= cut.start) & (at < cut.stop)
        chosen = torch.where((owners[at] == number)[:, None], keep, merged[at])
        merged[at] = torch.where(shared_out[:, None], chosen, torch.maximum(merged[at], keep))
    return merged


def owners_of(windows: list[Window]) -> Tensor:
    """(T,) for each token of the whole text the number of the window in which it has the most tokens of the part that
    was cut on its scarcer side, the earlier one of two alike; 0 for what stands in every window."""
    owners = torch.zeros(windows[0].length, dtype=torch.int64)
    most = torch.full((windows[0].length,), -1)  # tokens on the scarcer side, so far
    for number, window in enumerate(windows):
        at = torch.arange(window.piece.start, window.piece.stop)
        context = torch.minimum(at - window.piece.start, window.piece.stop - 1 - at)
        better = at[context > most[at]]
        owners[better], most[at] = number, torch.maximum(most[at], context)
    return owners


def merge_answers(
    examples: Examples, numbers: list[int], windows: list[Window], rows: list[dict[str, Any]]
) -> tuple[Tensor, list[str]]:
    """The text's answers (1 + S, A), the original one and then one per site, and the same in words.

    A span is that of the window that gives its own best span the highest score (the earlier one of two alike), and
    numbered as the whole text's tokens are. What is said at a place is said by the window that the place's P(keep)
    comes from, or by the first of all if it stands in every window. Others follow from the scores, see
    `Kind.of_windows`: a class is the one with the highest mean probability over the windows.
    """
    kind, found = kind_in(examples, rows), [row["answers"] for row in rows]
    if isinstance(kind, Span):  # which is put in words by the window that it is from
        spans, words = [], []
        scores = torch.stack([row["answer_scores"] for row in rows])  # (windows, 1 + S, 1)
        for prediction, best in enumerate(scores.squeeze(-1).argmax(0).tolist()):
            span, positions = found[best][prediction].tolist(), windows[best].positions
            spans.append([positions[token] for token in span])
            words.append(examples.describe(numbers[best], span))
        return torch.tensor(spans), words
    if isinstance(kind, AtPositions):
        answers = _at_positions(kind, examples, numbers, windows, found)
    elif isinstance(kind, Own):
        answers = torch.cat(found, 1)
    else:
        answers = kind.of_windows(torch.stack([row["answer_scores"] for row in rows]))
    return answers, [examples.describe(numbers[0], answer) for answer in answers.tolist()]


def kind_in(examples: Examples, rows: list[dict[str, Any]]) -> Kind:
    """The kind of the predictions in `rows`; one that the examples have does not travel with them, see `over_texts`."""
    return examples.kind or rows[0]["kind"]


def _at_positions(
    kind: AtPositions, examples: Examples, numbers: list[int], windows: list[Window], found: list[Tensor]
) -> Tensor:
    """(1 + S, P) the answers at the places of a whole text, in their order."""
    owners = owners_of(windows)
    at: dict[int, Tensor] = {}
    for number, (i, window, answers) in enumerate(zip(numbers, windows, found, strict=True)):
        places = kind.chosen(examples.collate([examples[i]]))[0].nonzero()[:, 0].tolist()
        positions = window.positions
        for place, said in zip(places, answers.unbind(1), strict=False):  # behind the last place there is padding
            if owners[positions[place]] == number:
                at[positions[place]] = said
    return torch.stack([at[position] for position in sorted(at)], 1)
