"""Where a state stands among what a module is given or returns: alone, in a tuple or list, packed, by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .registry import Site


def argument_name(module: nn.Module, args: tuple, index: int) -> str:
    """The name by which an argument was given that isn't among the positional ones."""
    if index < len(args):
        return ""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names[index] if index < len(names) else ""


def state_at(values: Any, site: Site, index: int) -> Tensor:
    """The state in arguments or an output; of packed sequences the padded states, (B, T, H)."""
    state = entry(values, index)
    if isinstance(state, PackedSequence):
        return pad_packed_sequence(state, batch_first=True)[0]
    if isinstance(state, Tensor) and not state.is_nested:
        return state
    parts = values if type(values) in (tuple, list) else (values,)
    got = ", ".join("nested Tensor" if getattr(v, "is_nested", 0) else type(v).__name__ for v in parts) or "nothing"
    remedy = "pass enable_nested_tensor=False to the encoder" if "nested" in got else "register where the state stands"
    raise TypeError(f"site {site}: expected a tensor there, got ({got}): {remedy}")


def entry(values: Any, index: int) -> Any:
    """None if there is no such entry; what stands alone is its own entry 0."""
    if type(values) not in (tuple, list):  # alone, or packed, which is a tuple too
        return values if index == 0 else None
    return values[index] if index < len(values) else None


def others(values: Any, index: int) -> list[Any]:
    """What stands beside the entry."""
    return [x for i, x in enumerate(values) if i != index] if type(values) in (tuple, list) else []


def with_entry(values: Any, index: int, new: Any) -> Any:
    """The same arguments or output with another entry there."""
    if type(values) in (tuple, list):
        return type(values)((*values[:index], with_entry(values[index], 0, new), *values[index + 1 :]))
    return _packed_like(values, new) if isinstance(values, PackedSequence) else new


def emptied(output: Any) -> Any:
    """An output of that form without anything in it, for `with_entry`."""
    return None if isinstance(output, Tensor) else type(output)([None] * len(output))


def _packed_like(old: PackedSequence, padded: Tensor) -> PackedSequence:
    """(B, T, H) states packed in the order in which the old ones are."""
    _, lengths = pad_packed_sequence(old)
    order = torch.arange(len(lengths)) if old.sorted_indices is None else old.sorted_indices
    packed = pack_padded_sequence(padded[order], lengths[order.cpu()], batch_first=True)
    return PackedSequence(packed.data, old.batch_sizes, old.sorted_indices, old.unsorted_indices)
