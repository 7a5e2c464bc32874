"""A progress bar with the time left, for loops that are ours; the trainer brings its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], what: str, show: bool = True) -> Iterable[T]:
    """`items`, with a bar on the terminal while they are used."""
    if not show:
        return items
    from rich.progress import track

    return track(items, description=what)
