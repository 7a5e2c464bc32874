"""The checks of the methods' options: each raises one error that says what came and what was expected."""

from __future__ import annotations

from typing import Any


def above_zero(name: str, value: Any) -> None:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}; expected a number above 0")


def whole(name: str, value: Any, least: int | None = None) -> None:
    """A whole number, of at least `least` if that is given."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        end = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} is {value!r}; expected a whole number{end}")


def learning(steps: Any, rate: Any, seed: Any) -> None:
    """What methods have in common that take steps under noise."""
    whole("steps", steps, 1)
    above_zero("rate", rate)
    whole("seed", seed)
