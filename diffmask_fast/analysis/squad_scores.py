"""Is an answer right? SQuAD's exact match and F1, and the tokens of the gold answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmask_fast.analysis.words import Part
from diffmask_fast.attribution import Attributions
from diffmask_fast.data import SECOND
from diffmask_fast.tasks.squad import Answer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and articles, as SQuAD's evaluation has them.

    Source: Rajpurkar et al., EMNLP 2016, section 6.1.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(answer: str, gold: str) -> float:
    """1 where the two are the same once `normalised`, else 0."""
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, as often as each stands there; 0 where they share none."""
    words, wanted = normalised(answer), normalised(gold)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


class Scores(NamedTuple):
    """How right the answers of N texts are, the original one first and then that of each of S sites.

    Attributes:
        exact_match: (N, 1 + S) float32, 0 or 1.
        f1: (N, 1 + S) float32, in [0, 1].
    """

    exact_match: Tensor
    f1: Tensor


def squad_scores(attributions: Attributions, answers: Sequence[Sequence[Answer]]) -> Scores:
    """The original and the masked answers against the gold answers: the best over those.

    Args:
        attributions: of questions.
        answers: for each question its gold answers, see `squad_answers`.

    Raises:
        ValueError: not an entry for each text, or a text without a gold answer.
    """
    _check(attributions, answers)
    rows = [(text.original, *text.masked) for text in attributions]

    def best(score: Callable[[str, str], float]) -> Tensor:
        return torch.tensor(
            [
                [max(score(said, gold.text) for gold in own) for said in row]
                for row, own in zip(rows, answers, strict=True)
            ]
        )

    return Scores(best(exact_match), best(f1))


def answer_tokens(attributions: Attributions, parts: Sequence[Part], answers: Sequence[Sequence[Answer]]) -> Tensor:
    """(sum T_i,) bool: the tokens that hold characters of the first gold answer of their passage.

    Args:
        attributions: of questions.
        parts: see `located`; made from the passages, since answers are counted in their characters.
        answers: as in `squad_scores`.

    Raises:
        ValueError: as `squad_scores`; an answer in whose place the passage holds something else.
    """
    _check(attributions, answers)
    chosen = torch.zeros(len(attributions.keep), dtype=torch.bool)
    for part in parts:
        if part.segment != SECOND:
            continue
        start, text = answers[part.number][0]
        if part.text[start : start + len(text)] != text:
            raise ValueError(f"the passage of text {part.number} does not hold {text!r} at character {start}")
        for row, (begin, end) in zip(part.rows, part.spans, strict=True):
            chosen[row] = begin < start + len(text) and end > start
    return chosen


def _check(attributions: Attributions, answers: Sequence[Sequence[Answer]]) -> None:
    if len(answers) != len(attributions):
        raise ValueError(f"got answers of {len(answers)} questions and attributions of {len(attributions)} texts")
    if not all(answers):
        raise ValueError(f"question {[bool(own) for own in answers].index(False)} has no gold answer")
