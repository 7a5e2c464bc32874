"""The Triton backend: plans where rows lie, chooses tiles, allocates what the kernels fill.

Tiles follow from shapes and dtypes alone. Nothing is tuned at run time: the first call is not slow for it, and a result
has the same bits on every run and every GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmask_fast.ops.layout import Dim, Layout, ceil_divide, plan

MOST_GATES = 1024
"""K of a row, all of which one program holds."""

TILE_BYTES = 8192
"""Of states, per program and step: for 128 threads four 128-bit loads each, enough to keep the memory busy."""

WIDEST = 1024
"""Columns of a tile. Wider rows take several steps, or in backward several programs."""

GATES_OF_A_TILE = 512
"""Four for a thread. With short rows and many gates this, and not TILE_BYTES, says how many rows a tile has."""

PROGRAMS = 512
"""What backward aims at where few baselines are shared by many rows: a few programs for each multiprocessor."""

FEWEST_ROWS = 16
"""Of a part in backward, lest its float32 sum for the baseline be more to write than the part is to read."""

SUM_TILE = (32, 128)
"""Parts and columns that a program sums at a time."""

# No contraction to fused multiply-adds: see kernels/gate_math.py. There are no loops that Triton could pipeline.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


def interpreting() -> bool:
    """Whether Triton interprets kernels, on any device, instead of compiling them: it was told so before its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def unavailable() -> str | None:
    """None where it can run, else the reason why it can't."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'diffmask-fast[gpu]'"
    if not interpreting() and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU (TRITON_INTERPRET=1 in the environment checks it without one)"
    return None


def gate_mix_forward(
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    seed: Tensor,
    temperature: float,
    left: float,
    right: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, logits = plan(states, baseline), _dense(logits)
    rows, width, count = logits[..., 0].numel(), states.shape[-1], _count(logits)
    mixed = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    gates = torch.empty(logits.shape, dtype=torch.float32, device=states.device)
    log_open = torch.empty_like(gates)
    tile = _tile(width, states.element_size(), count, rows)
    vector = _vector(width, layout.states, [dim.states for dim in layout.dims])
    # From outer to inner in the order of rows, each with how many baselines a step along it moves.
    dims = [(dim, at) for dim, at in zip(layout.dims, (layout.dims[1].size, 1, 0, 0), strict=True) if dim.size > 1]
    dims = sorted(dims, key=lambda dim: -dim[0].row) or [(Dim(1, 1, 0, 0), 0)]
    with torch.cuda.device_of(states):
        _kernels().forward_kernel[(ceil_divide(rows, tile.rows),)](
            layout.states,
            logits,
            layout.baseline,
            seed.contiguous(),
            mixed,
            gates,
            log_open,
            rows,
            count,
            width // vector,
            tuple(dim.row for dim, _ in dims),
            tuple(dim.states // vector for dim, _ in dims),
            tuple(at for _, at in dims),
            *_law(temperature, left, right),
            R=tile.rows,
            C=tile.columns,
            BITS=_bits(count),
            V=vector,
            num_warps=tile.warps,
            **OPTIONS,
        )
    return mixed, gates, log_open


def gate_mix_backward(
    grad_mixed: Tensor | None,
    grad_gates: Tensor | None,
    grad_log_open: Tensor | None,
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    seed: Tensor,
    temperature: float,
    left: float,
    right: float,
    need_states: bool,
    need_baseline: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits_dtype, logits, seed = logits.dtype, _dense(logits), seed.contiguous()
    law = _law(temperature, left, right)
    grad_states = grad_baseline = dots = partial = None
    with torch.cuda.device_of(states):
        if grad_mixed is not None:
            layout = plan(states, baseline, grad_mixed.to(states.dtype))
            if need_states:
                grad_states = torch.empty(states.shape, dtype=states.dtype, device=states.device)
            if need_baseline:
                grad_baseline = torch.empty_like(layout.baseline)
            dots, partial = _mix_backward(layout, logits, seed, law[:3], grad_states, grad_baseline)
        grad_logits = _finish(dots, grad_gates, grad_log_open, logits, seed, law, partial, grad_baseline)
    if grad_states is None:
        grad_states = states.new_zeros(states.shape if need_states else (0,))
    if grad_baseline is None:
        grad_baseline = baseline.new_zeros(baseline.shape if need_baseline else (0,))
    elif grad_baseline.shape != baseline.shape:  # the layout had to repeat it
        grad_baseline = grad_baseline.sum_to_size(baseline.shape)
    return grad_states, grad_logits.to(logits_dtype), grad_baseline


def _mix_backward(
    layout: Layout,
    logits: Tensor,
    seed: Tensor,
    law: tuple[float, ...],
    grad_states: Tensor | None,
    grad_baseline: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Fills the gradients that are given, of which the baseline's may have to be summed from parts.

    Returns the dots (chunks, rows) and the parts (parts, groups, H); None where one part is the whole gradient.
    """
    states, grad = layout.states, layout.grad
    assert grad is not None
    groups, members, width, count = layout.groups, layout.members, states.shape[-1], _count(logits)
    tile = _tile(width, states.element_size(), count, members)
    chunks = ceil_divide(width, tile.columns)
    parts = min(ceil_divide(PROGRAMS, groups * chunks), ceil_divide(members, FEWEST_ROWS))
    part_size = ceil_divide(ceil_divide(members, parts), tile.rows) * tile.rows
    parts = ceil_divide(members, part_size)
    vector = _vector(width, states, [dim.states for dim in layout.dims])
    vector = math.gcd(vector, _vector(width, grad, [dim.grad for dim in layout.dims]))
    dots = torch.empty((chunks, groups * members), dtype=torch.float32, device=states.device)
    partial = None
    if grad_baseline is not None and parts > 1:
        partial = torch.empty((parts, groups, width), dtype=torch.float32, device=states.device)
    _kernels().backward_kernel[(chunks * parts * groups,)](
        grad,
        states,
        logits,
        layout.baseline,
        seed,
        dots,
        grad_states,
        grad_baseline if partial is None else partial,
        groups * members,
        groups,
        members,
        parts,
        part_size,
        chunks,
        count,
        width // vector,
        *_places(layout.dims[:2], vector),
        *_places(layout.dims[2:], vector),
        *law,
        R=tile.rows,
        C=tile.columns,
        BITS=_bits(count),
        V=vector,
        num_warps=tile.warps,
        **OPTIONS,
    )
    return dots, partial


def _finish(
    dots: Tensor | None,
    grad_gates: Tensor | None,
    grad_log_open: Tensor | None,
    logits: Tensor,
    seed: Tensor,
    law: tuple[float, ...],
    partial: Tensor | None,
    grad_baseline: Tensor | None,
) -> Tensor:
    """The gradient of the logits; where there are parts, they are summed into grad_baseline."""
    grad_logits = torch.empty_like(logits)
    rows, count = logits[..., 0].numel(), _count(logits)
    tile_rows = min(_power_of_2(rows), max(1, GATES_OF_A_TILE >> _bits(count)))
    row_programs = ceil_divide(rows, tile_rows)
    parts, columns = (0, 0) if partial is None else (len(partial), partial[0].numel())
    _kernels().finish_kernel[(row_programs + ceil_divide(columns, SUM_TILE[1]),)](
        dots,
        None if grad_gates is None else grad_gates.contiguous(),
        None if grad_log_open is None else grad_log_open.contiguous(),
        logits,
        seed,
        grad_logits,
        partial,
        None if partial is None else grad_baseline,
        rows,
        count,
        0 if dots is None else len(dots),
        parts,
        columns,
        row_programs,
        *law,
        R=tile_rows,
        PARTS=SUM_TILE[0],
        C=SUM_TILE[1],
        BITS=_bits(count),
        num_warps=4,
        **OPTIONS,
    )
    return grad_logits


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("diffmask_fast.kernels.gate_mix")


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


def _tile(width: int, element_size: int, count: int, most_rows: int) -> Tile:
    """For rows of `width` values of `element_size` bytes with `count` gates, of which `most_rows` go together."""
    columns = min(_power_of_2(width), WIDEST)
    rows = min(TILE_BYTES // element_size // columns, max(1, GATES_OF_A_TILE >> _bits(count)), _power_of_2(most_rows))
    work = max(rows * columns * element_size * 4 // TILE_BYTES, (rows << _bits(count)) // 128)
    return Tile(rows, columns, min(4, max(1, work)))


def _vector(width: int, tensor: Tensor, strides: list[int]) -> int:
    """How many elements a load may take at once, of rows of that width and strides: at most 128 bits, and aligned."""
    size = tensor.element_size()
    return math.gcd(16 // size, width, tensor.data_ptr() // size, *strides)


def _places(dims: tuple[Dim, ...], vector: int) -> tuple[Any, Any]:
    """How an index over two dims is taken apart, and what a step moves, in rows and vectors of states and gradient."""
    outer, inner = dims
    steps: tuple[int, ...] = (inner.size, 1)
    if outer.size == 1:
        dims, steps = (inner,), (1,)
    moves = [(dim.row, dim.states // vector, dim.grad // vector) for dim in dims]
    return steps, tuple(zip(*moves, strict=True))


def _law(temperature: float, left: float, right: float) -> tuple[float, float, float, float]:
    return temperature, left, right - left, temperature * math.log(-left / right)


def _dense(logits: Tensor) -> Tensor:
    known = logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (logits if known else logits.float()).contiguous()


def _count(logits: Tensor) -> int:
    count = logits.shape[-1]
    if count > MOST_GATES:
        raise ValueError(
            f"backend 'triton' takes up to {MOST_GATES} gates for a state, and logits of shape {tuple(logits.shape)} "
            f"have {count}: use backend='reference'"
        )
    return count


def _bits(count: int) -> int:
    """of the columns of a tile of gates; at least two columns, or each thread would make the gates of all rows"""
    return max(1, (count - 1).bit_length())


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
