"""The checks at the door of `Attributions`: each raises one error that says what came and what to do."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def site_names(names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"site_names: expected a sequence of names, got {names!r}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"site_names: expected at least one name and no name twice, got {tuple(names)!r}")
    return tuple(names)


def json_meta(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise TypeError(f"meta: expected a dict, got {type(meta).__name__}")
    try:
        return json.loads(json.dumps(meta, allow_nan=False))  # also a copy: a frozen result shares nothing mutable
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta: expected values that JSON can hold ({error}); convert them to str or float") from error


def texts(tokens: Any, original: Any, masked: Any, sites: int) -> None:
    for name, value in (("tokens", tokens), ("original", original), ("masked", masked)):
        if not isinstance(value, list):
            raise TypeError(f"{name}: expected a list with one entry per text, got {type(value).__name__}")
        if len(value) != len(tokens):
            raise ValueError(f"{name}: expected {len(tokens)} entries, one per text, got {len(value)}")
    for i, (text, prediction, row) in enumerate(zip(tokens, original, masked, strict=True)):
        if not isinstance(text, list) or not all(isinstance(token, str) for token in text):
            raise TypeError(f"tokens of text {i}: expected a list of str")
        if not text:
            raise ValueError(f"tokens of text {i}: expected at least one token, got none; leave empty texts out")
        if not isinstance(prediction, str):
            raise TypeError(f"original of text {i}: expected a str, got {type(prediction).__name__}")
        if not isinstance(row, list) or not all(isinstance(prediction, str) for prediction in row):
            raise TypeError(f"masked of text {i}: expected a list of str")
        if len(row) != sites:
            raise ValueError(f"masked of text {i}: expected {sites} predictions, one per site, got {len(row)}")


def tensor(name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...], words: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != dtype or value.device.type != "cpu" or value.requires_grad:
        raise TypeError(
            f"{name}: expected {dtype} on the CPU without gradient, got {value.dtype} on {value.device}"
            f"{' with gradient' if value.requires_grad else ''}; use .detach().to('cpu', {dtype})"
        )
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape} = {words}, got {tuple(value.shape)}")


def within(name: str, value: Tensor, low: float, high: float, words: str) -> None:
    wrong = ~((value >= low) & (value <= high))  # NaN is neither, so it counts as wrong
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}: expected {words}; got {value[tuple(where)].item()} at {where}")
