"""Tables for papers and programs: the same rows as Markdown and as CSV."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmask_fast.files import replacing
from diffmask_fast.report import printable

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        name: of its files, without an ending.
        title: what it shows, in a line.
        columns: their names.
        rows: a cell for each column; None is an empty one.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} has {len(row)} cells and the table {self.name} {len(self.columns)} columns"
                )


def save_table(table: Table, path: str | os.PathLike[str]) -> None:
    """Write a table as Markdown (.md), with numbers as people read them, or as CSV (.csv), with all their digits.

    Raises:
        ValueError: another ending.
        FileNotFoundError: the folder of `path` does not exist.
    """
    ending = Path(path).suffix
    if ending not in (".md", ".csv"):
        raise ValueError(f"{path}: a table is written as .md or .csv")
    with replacing(path) as temporary:
        if ending == ".md":
            temporary.write_text(markdown(table), encoding="utf-8", newline="\n")
            return
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table.columns)
            writer.writerows(["" if cell is None else cell for cell in row] for row in table.rows)


def markdown(table: Table) -> str:
    """The table with its title above it."""
    lines = [table.columns, ["---"] * len(table.columns), *[[written(cell) for cell in row] for row in table.rows]]
    body = "\n".join("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table.title}\n\n{body}\n"


def written(cell: Cell) -> str:
    """A cell as people read it: numbers with a fraction have three significant digits below 100."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
