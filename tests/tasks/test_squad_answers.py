from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffmask_fast.tasks.squad import Answer, read_squad, squad_answers


def write(path: Path, *answers: Any) -> Path:
    qas = [
        {"question": f"who {i} ?", **({} if given is None else {"answers": given})} for i, given in enumerate(answers)
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": " the old king", "qas": qas}]}]}))
    return path


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    king, old = {"text": "king", "answer_start": 9}, {"text": "old king", "answer_start": 5}
    path = write(tmp_path / "questions.json", [king, old], [old])
    assert squad_answers(path) == [[Answer(9, "king"), Answer(5, "old king")], [Answer(5, "old king")]]
    passage = read_squad(path)[0][1]
    assert passage[5:13] == "old king"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, "has no answer"),
        ([], "has no answer"),
        ([{"text": "king"}], "answer_start"),
        ([{"text": "king", "answer_start": 8}], "does not hold 'king' at character 8"),
        ([{"text": "king", "answer_start": -4}], "does not hold 'king' at character -4"),
        ([{"text": 3, "answer_start": 8}], "expected"),
        (["king"], "expected"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_place(answers: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "questions.json", [{"text": "king", "answer_start": 9}], answers)
    with pytest.raises(ValueError, match=rf"data\[0\]\.paragraphs\[0\]\.qas\[1\].*{message}") as caught:
        squad_answers(path)
    assert str(path) in str(caught.value)


@pytest.mark.shared
def test_the_answers_of_real_questions_stand_where_they_say(shared: Path) -> None:
    path = shared / "data" / "squad" / "dev.json"
    answers = squad_answers(path)
    assert len(answers) == len(read_squad(path)) == 535
