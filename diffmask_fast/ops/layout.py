"""Where the rows of a strided tensor lie, said in a way that a GPU kernel can follow without a loop.

The leading dims of the states are of two kinds. Along a *group* dim the baseline has a row for each index, along a
*member* dim it has one for all: the rows of a group share a baseline, and their gradients are summed for it. Neighbours
of one kind become one dim where the strides allow it; two dims of each kind are then enough for what people use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIMS_OF_A_KIND = 2


class Dim(NamedTuple):
    """One (merged) leading dim: its size, and how far a step along it moves."""

    size: int
    row: int
    """in the row-major index of rows"""
    states: int
    """in elements of the states"""
    grad: int
    """in elements of the gradient of the mixed states"""


class Layout(NamedTuple):
    """Group dims, then member dims, each kind from outer to inner and filled up with dims of size 1, and the tensors
    that they are about: the caller's, or copies of them where no four dims describe those."""

    dims: tuple[Dim, ...]
    states: Tensor
    baseline: Tensor
    """contiguous, one row for each group"""
    grad: Tensor | None

    @property
    def groups(self) -> int:
        return self.dims[0].size * self.dims[1].size

    @property
    def members(self) -> int:
        return self.dims[2].size * self.dims[3].size

    @property
    def rows(self) -> int:
        return self.groups * self.members

    def numbers(self) -> list[int]:
        """All of `dims` in a row: size, row, states, grad of the first, and so on."""
        return [number for dim in self.dims for number in dim]


def plan(states: Tensor, baseline: Tensor, grad: Tensor | None = None) -> Layout:
    """The layout for states (..., H), a baseline that broadcasts to them and a gradient of the states' shape.

    The last dim of states and gradient is made to have stride 1; other dims may have any, 0 among them.
    """
    states = unit_stride(states)
    grad = None if grad is None else unit_stride(grad)
    dims = _dims(states, baseline, grad)
    if dims is None:
        states = states.contiguous()
        grad = None if grad is None else grad.contiguous()
        dims = _dims(states, baseline, grad)
    if dims is None:  # broadcast and not broadcast in turn, over five dims or more
        baseline = baseline.expand(states.shape)
        dims = _dims(states, baseline, grad)
    assert dims is not None
    return Layout(dims, states, baseline.contiguous(), grad)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with stride 1 in the last dim; `.contiguous()` leaves a last dim of size 1 as it is."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def flat_rows(state: Tensor) -> Tensor:
    """(..., H) as (R, H), the last stride 1."""
    return unit_stride(state.reshape(-1, state.shape[-1]))


def ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def _dims(states: Tensor, baseline: Tensor, grad: Tensor | None) -> tuple[Dim, ...] | None:
    shape = states.shape[:-1]
    shared = _shared(states, baseline)
    found: list[tuple[bool, Dim]] = []  # from inner to outer
    row = 1
    for d in reversed(range(len(shape))):
        dim = Dim(shape[d], row, states.stride(d), 0 if grad is None else grad.stride(d))
        row *= shape[d]
        if dim.size == 1:
            continue
        if found and found[-1][0] == shared[d] and _follows(dim, found[-1][1]):
            inner = found.pop()[1]
            dim = Dim(dim.size * inner.size, *inner[1:])
        found.append((shared[d], dim))
    filled: list[Dim] = []
    for kind in (False, True):
        dims = [dim for is_shared, dim in reversed(found) if is_shared == kind]
        if len(dims) > DIMS_OF_A_KIND:
            return None
        filled += [Dim(1, 0, 0, 0)] * (DIMS_OF_A_KIND - len(dims)) + dims
    return tuple(filled)


def _shared(states: Tensor, baseline: Tensor) -> list[bool]:
    """For each leading dim of the states, whether the baseline has one row for all of it."""
    missing = states.dim() - baseline.dim()
    return [d < missing or baseline.shape[d - missing] != states.shape[d] for d in range(states.dim() - 1)]


def _follows(outer: Dim, inner: Dim) -> bool:
    return all(o == inner.size * i for o, i in zip(outer[1:], inner[1:], strict=True))
