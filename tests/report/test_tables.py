from __future__ import annotations

import csv
from pathlib import Path

import pytest

from diffmask_fast.report.tables import Table, markdown, save_table, written

TABLE = Table("few", "A few numbers", ("method", "nats", "texts"), [("a|b", 0.123456, 1101), ("c", None, 2)])


def test_markdown_has_a_line_for_each_row() -> None:
    assert markdown(TABLE).splitlines() == [
        "A few numbers",
        "",
        "| method | nats | texts |",
        "| --- | --- | --- |",
        "| a\\|b | 0.123 | 1,101 |",
        "| c |  | 2 |",
    ]


def test_csv_keeps_all_digits(tmp_path: Path) -> None:
    save_table(TABLE, tmp_path / "few.csv")
    with open(tmp_path / "few.csv", newline="") as file:
        assert list(csv.reader(file)) == [["method", "nats", "texts"], ["a|b", "0.123456", "1101"], ["c", "", "2"]]


@pytest.mark.parametrize(
    ("cell", "words"), [(0.00012345, "0.000123"), (123.4, "123"), (12345, "12,345"), (float("inf"), "inf"), (1.0, "1")]
)
def test_numbers_are_written_for_people(cell: float, words: str) -> None:
    assert written(cell) == words


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 2 cells and the table t 1 columns"):
        Table("t", "", ("a",), [("x",), ("x", "y")])


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written as \.md or \.csv"):
        save_table(TABLE, tmp_path / "few.txt")
