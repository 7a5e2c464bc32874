"""What `gate_mix` asks of its input. Every check stands here, at the door; nothing below checks again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffmask_fast.ops.probe_reference import Head

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_gate_mix(
    states: Tensor, logits: Tensor, baseline: Tensor, seed: Tensor | None, generator: torch.Generator | None
) -> None:
    """Raise TypeError for a wrong kind or dtype, ValueError for all else that is wrong with these."""
    for name, tensor in (("states", states), ("logits", logits), ("baseline", baseline)):
        _check_tensor(name, tensor, states)
    _check_shapes(states, logits, baseline)
    _check_dtypes(states, logits, baseline)
    if states.stride(-1) != 1 and states.shape[-1] > 1:
        raise ValueError(
            f"states have stride {states.stride(-1)} in their last dim (strides {tuple(states.stride())}), "
            "expected 1: the values of one state must lie side by side. Call .contiguous() on them"
        )
    if seed is not None:
        _check_seed(seed, states, generator)


def check_law(temperature: float, left: float, right: float) -> None:
    """Raise TypeError or ValueError unless temperature > 0, left < 0 and right >= 1, all finite numbers."""
    for name, value in (("temperature", temperature), ("left", left), ("right", right)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
        if not -math.inf < value < math.inf:  # Dynamo traces this, and not math.isfinite
            raise ValueError(f"{name} is {value}, expected a finite number")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
    if not left < 0:
        raise ValueError(f"left is {left}, expected a number below 0: otherwise no gate is ever exactly 0")
    if not right >= 1:
        raise ValueError(f"right is {right}, expected 1 or more: otherwise no gate comes near 1")


def non_finite_error(logits: Tensor, flat_index: int) -> ValueError:
    """The error for the element of ``logits`` (..., K) at the row-major ``flat_index``."""
    place: tuple[int, ...] = ()
    rest = flat_index
    for size in reversed(logits.shape):
        place = (rest % size, *place)
        rest //= size
    return ValueError(
        f"logits must be finite, but row {place[:-1]}, gate {place[-1]} is {logits[place].item()}. "
        "Look for an overflow or a division by zero in what computes the logits"
    )


def _check_tensor(name: str, tensor: Tensor, states: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} have layout {tensor.layout}, expected a dense tensor")
    if tensor.device != states.device:
        raise ValueError(f"{name} is on {tensor.device} and states on {states.device}: move them to one device")


def _check_shapes(states: Tensor, logits: Tensor, baseline: Tensor) -> None:
    if states.dim() < 2:
        raise ValueError(f"states have shape {_shape(states)}, expected (..., H) with at least one dim before H")
    if logits.dim() != states.dim() or logits.shape[:-1] != states.shape[:-1]:
        raise ValueError(
            f"logits have shape {_shape(logits)} and states {_shape(states)}: expected logits of shape "
            f"{_shape(states)[:-1]} + (K,), K gates for each state"
        )
    if states.numel() == 0:
        raise ValueError(f"states have shape {_shape(states)}, which is empty: leave empty batches out")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {_shape(logits)}: expected at least one gate in the last dim")
    fits = 1 <= baseline.dim() <= states.dim() and baseline.shape[-1] == states.shape[-1]
    if fits:
        leading = states.shape[states.dim() - baseline.dim() : -1]
        fits = all(b in (1, s) for b, s in zip(baseline.shape[:-1], leading, strict=True))
    if not fits:
        raise ValueError(
            f"baseline has shape {_shape(baseline)}, which does not broadcast to states of shape "
            f"{_shape(states)}: expected ({states.shape[-1]},), or dims before it that are 1 or the states'"
        )


def _check_dtypes(states: Tensor, logits: Tensor, baseline: Tensor) -> None:
    if states.dtype not in STATE_DTYPES:
        raise TypeError(f"states are {states.dtype}, expected one of {', '.join(map(str, STATE_DTYPES))}")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}, expected a floating point dtype")
    doubles = [t.dtype == torch.float64 for t in (states, logits, baseline)]
    if any(doubles) and not all(doubles):
        raise TypeError(
            f"states are {states.dtype}, logits {logits.dtype} and baseline {baseline.dtype}: float64 and "
            "smaller dtypes do not mix. Make all three float64 or none"
        )
    if baseline.dtype not in (torch.float32, states.dtype):
        raise TypeError(f"baseline is {baseline.dtype}, expected torch.float32 or the states' {states.dtype}")


def _check_seed(seed: Tensor, states: Tensor, generator: torch.Generator | None) -> None:
    if generator is not None:
        raise ValueError("both seed and generator are given: expected one of them, for one decides the gates")
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (2,):
        came = f"{seed.dtype} of shape {_shape(seed)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed is {came}, expected an int64 tensor of shape (2,): (seed, offset), as from draw_seed()")
    if seed.device != states.device:
        raise ValueError(f"seed is on {seed.device} and states on {states.device}: move them to one device")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_probe_logits(
    states: Sequence[Tensor], heads: Sequence[tuple[Tensor, ...]], first: Tensor | None, bound: float | None
) -> None:
    """Raise TypeError for a wrong kind or dtype, ValueError for all else that is wrong with these."""
    if not states or len(states) != len(heads):
        raise ValueError(f"{len(states)} states and {len(heads)} heads, expected one head for each state, at least one")
    if bound is not None and (not isinstance(bound, (int, float)) or not 0 < bound < math.inf):
        raise ValueError(f"bound is {bound}, expected a finite number above 0, or None")
    named = [(f"states[{i}]", state) for i, state in enumerate(states)]
    for name, state in [("first", first), *named] if first is not None else named:
        _check_tensor(name, state, states[0])
        if state.dim() < 2:
            raise ValueError(f"{name} has shape {_shape(state)}, expected (..., H) with at least one dim before H")
        if state.shape[:-1] != states[0].shape[:-1]:
            raise ValueError(
                f"{name} has shape {_shape(state)} and states[0] {_shape(states[0])}: expected them to differ in the "
                "last dim alone"
            )
        if state.dtype != states[0].dtype or state.dtype not in STATE_DTYPES:
            raise TypeError(
                f"{name} is {state.dtype} and states[0] {states[0].dtype}: expected all of one dtype, one of "
                f"{', '.join(map(str, STATE_DTYPES))}"
            )
        if state.numel() == 0:
            raise ValueError(f"{name} has shape {_shape(state)}, which is empty: leave empty batches out")
    for i, head in enumerate(heads):
        if not isinstance(head, tuple) or len(head) != len(Head._fields):
            raise TypeError(f"heads[{i}] is a {type(head).__name__}, expected a Head({', '.join(Head._fields)})")
    width, dtype = heads[0][2].shape[0] if heads[0][2].dim() else 0, heads[0][0].dtype
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        reads = state.shape[-1] + (first.shape[-1] if first is not None else 0)
        shapes = ((width, 1), (width, reads), (width,), (1, 1), (1, width), ())
        for field, weight, shape in zip(Head._fields, head, shapes, strict=True):
            name = f"heads[{i}].{field}"
            _check_tensor(name, weight, states[0])
            if weight.shape != shape or width == 0:
                raise ValueError(f"{name} has shape {_shape(weight)}, expected {shape} for the states that it reads")
            if weight.dtype != dtype or not weight.is_floating_point():
                raise TypeError(f"{name} is {weight.dtype} and {dtype} came before it: expected one floating dtype")
    if (dtype == torch.float64) != (states[0].dtype == torch.float64):
        raise TypeError(
            f"states are {states[0].dtype} and heads {dtype}: float64 and smaller dtypes do not mix. Make both float64 "
            "or none"
        )
