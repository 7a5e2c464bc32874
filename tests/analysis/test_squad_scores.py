from __future__ import annotations

from typing import Any

import pytest
from token_lists import pair

from diffmask_fast.analysis.squad_scores import answer_tokens, exact_match, f1, normalised, squad_scores
from diffmask_fast.analysis.words import Part
from diffmask_fast.tasks.squad import Answer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  King, of a River!", ["king", "of", "river"]),
        ("Levi's Stadium", ["levis", "stadium"]),
        ("an-other theatre", ["another", "theatre"]),  # punctuation goes first, and articles are whole words
        ("U.S.A.", ["usa"]),
        ("the a an", []),
        ("", []),
        ("30–60%", ["30–60"]),  # only ASCII punctuation goes
    ],
)
def test_answers_are_normalised_as_squad_does(text: str, words: list[str]) -> None:
    assert normalised(text) == words


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "score"),
    [
        ("the old king", "Old King.", 1, 1),
        ("old king", "the old queen", 0, 1 / 2),
        ("king king", "king", 0, 2 / 3),  # precision 1/2, recall 1
        ("old king of paris", "paris", 0, 2 / 5),  # precision 1/4, recall 1
        ("paris", "rome", 0, 0),
        ("", "rome", 0, 0),
    ],
)
def test_scores_are_those_worked_by_hand(answer: str, gold: str, exact: float, score: float) -> None:
    assert exact_match(answer, gold) == exact
    assert f1(answer, gold) == pytest.approx(score)


def test_the_best_gold_answer_counts_for_the_original_and_for_each_site(make: Any) -> None:
    attributions = make(
        [pair("who", "old king"), pair("where", "paris")],
        sites=2,
        original=["the king", "rome"],
        masked=[["old king", "queen"], ["rome", "in paris"]],
    )
    scores = squad_scores(attributions, [[Answer(0, "old king"), Answer(4, "king")], [Answer(0, "paris")]])
    assert scores.exact_match.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert scores.f1.tolist() == [[1, 1, 0], [0, 0, pytest.approx(2 / 3)]]


def test_the_answers_tokens_hold_its_characters(make: Any) -> None:
    attributions = make([pair("the king", "the king s paris")])
    question = Part(0, 1, "the king", [1, 2], [(0, 3), (4, 8)])
    passage = Part(0, 2, "the king's paris", [4, 5, 6, 7], [(0, 3), (4, 8), (8, 10), (11, 16)])
    # the first gold answer, from inside a token on
    chosen = answer_tokens(attributions, [question, passage], [[Answer(5, "ing's"), Answer(11, "paris")]])
    assert chosen.nonzero().flatten().tolist() == [5, 6]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answers of 0 questions and attributions of 1 texts"),
        ([[]], "question 0 has no gold answer"),
        ([[Answer(1, "king")]], "passage of text 0 does not hold 'king' at character 1"),
    ],
)
def test_answers_that_do_not_fit_are_refused(answers: list, message: str, make: Any) -> None:
    attributions = make([pair("who", "king")])
    with pytest.raises(ValueError, match=message):
        answer_tokens(attributions, [Part(0, 2, "king", [3], [(0, 4)])], answers)
