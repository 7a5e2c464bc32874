"""The C++ backend of `probe_logits`: PyTorch's matrix products into place, C++ for what comes between them.

Sites are taken one after the other, so that the hidden values of one are still in the cache when the epilogue comes.
The state at the first site is often an embedding's output: of all its rows, a text has many alike, and the product with
the left half of the weight is made once for rows that are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from diffmask_fast.ops import cpu
from diffmask_fast.ops.layout import flat_rows
from diffmask_fast.ops.probe_reference import grad_of_raw, heads_of

CHUNK_ROWS = 4096  # a chunk's hidden values, 256 wide, are 4 MiB
WORTHWHILE = 0.8  # the share of distinct rows below which they are told apart

_ops = torch.ops.diffmask_fast


def unavailable() -> str | None:
    return cpu.unavailable()


class First:
    """The rows of the state at the first site: the distinct ones, and where each of them stands."""

    def __init__(self, first: Tensor) -> None:
        rows = flat_rows(first)
        index = torch.empty(len(rows), dtype=torch.int64)
        places = torch.empty_like(index)
        distinct = _ops.probe_distinct_rows_cpu(rows, index, places)
        self.index: Tensor | None = None
        if distinct < WORTHWHILE * len(rows):
            self.index = index
            rows = rows[places[:distinct]]
        self.rows = rows.float()


def probe_logits_forward(
    first: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    bound: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    leading, count, rows = states[0].shape[:-1], len(states), states[0].shape[:-1].numel()
    heads = heads_of([weight.float().contiguous() for weight in weights])
    width = heads[0].bias.shape[0]
    logits = torch.empty(*leading, count)
    raw = torch.empty(count, rows)
    hidden = torch.empty((count, rows, width) if save else (0,))
    scratch = None if save else torch.empty(min(rows, CHUNK_ROWS), width)
    known = None if first is None else First(first)
    left = None if known is None or known.index is None else torch.empty(len(known.rows), width)
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        split = 0 if known is None else known.rows.shape[1]
        scale = head.magnitude / vector_norm(head.direction, dim=1, keepdim=True)
        outer = head.outer_magnitude / vector_norm(head.outer_direction) * head.outer_direction
        if left is not None:
            assert known is not None
            torch.mm(known.rows, head.direction[:, :split].T, out=left)
        read = flat_rows(state)
        for chunk in _chunks(rows):
            out = hidden[i, chunk] if scratch is None else scratch[: chunk.stop - chunk.start]
            torch.mm(read[chunk].float(), head.direction[:, split:].T, out=out)
            if known is not None and left is None:
                out.addmm_(known.rows[chunk], head.direction[:, :split].T)
            index = None if known is None or known.index is None else known.index[chunk]
            column = logits.view(rows, count)[chunk, i]
            _ops.probe_epilogue_cpu(
                out, left, index, scale, head.bias, outer, head.offset, bound or 0.0, raw[i, chunk], column
            )
    return logits, raw, hidden


def probe_logits_backward(
    grad: Tensor,
    first: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    raw: Tensor,
    hidden: Tensor,
    bound: float | None,
    need_first: bool,
    need_states: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    count, rows, width = hidden.shape
    heads = heads_of([weight.float().contiguous() for weight in weights])
    grads_raw = grad_of_raw(grad, raw, bound)
    offsets = grad.reshape(rows, count).sum(0, dtype=torch.float32)
    known = None if first is None else First(first)
    split = 0 if known is None else known.rows.shape[1]
    gathered = None if known is None or known.index is None else torch.empty(len(known.rows), width)
    inside = torch.empty(min(rows, CHUNK_ROWS), width)
    grad_first = torch.zeros(rows, split) if need_first else None
    grad_states, grad_weights = [], []
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        norm = vector_norm(head.direction, dim=1, keepdim=True)
        scale = head.magnitude / norm
        outer_norm = vector_norm(head.outer_direction)
        outer = head.outer_magnitude / outer_norm * head.outer_direction
        sums = torch.zeros(2, width)
        product = torch.empty_like(head.direction)
        grad_state = torch.empty(rows, state.shape[-1]) if need_states else None
        if gathered is not None:
            gathered.zero_()
        read = flat_rows(state)
        for chunk in _chunks(rows):
            part = inside[: chunk.stop - chunk.start]
            _ops.probe_epilogue_backward_cpu(grads_raw[i, chunk], hidden[i, chunk], outer, part, sums)
            _add_product(part.T, read[chunk].float(), product[:, split:], chunk)
            if gathered is not None:
                assert known is not None and known.index is not None
                _ops.probe_scatter_add_cpu(part, known.index[chunk], gathered)
            elif known is not None:
                _add_product(part.T, known.rows[chunk], product[:, :split], chunk)
            if grad_first is not None or grad_state is not None:
                part *= scale.squeeze(1)
            if grad_state is not None:
                torch.mm(part, head.direction[:, split:], out=grad_state[chunk])
            if grad_first is not None:
                grad_first[chunk].addmm_(part, head.direction[:, :split])
        if gathered is not None:
            assert known is not None
            torch.mm(gathered.T, known.rows, out=product[:, :split])
        grad_states.append(state.new_empty(0) if grad_state is None else grad_state.to(state.dtype).view(state.shape))
        grad_magnitude = _through_norm(product, head.direction, norm, scale)
        outer_product = sums[1:].clone()
        grad_outer = _through_norm(outer_product, head.outer_direction, outer_norm, head.outer_magnitude / outer_norm)
        grad_weights += [grad_magnitude, product, sums[0].clone(), grad_outer, outer_product, offsets[i].clone()]
    if grad_first is None:
        result = states[0].new_empty(0)
    else:
        assert first is not None
        result = grad_first.to(first.dtype).view(first.shape)
    return result, grad_states, [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def _through_norm(grad: Tensor, direction: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
    """From the gradient (N, F) of ``scale * direction`` to that of the direction, in place, and of the magnitude."""
    unit = direction / norm
    along = (grad * unit).sum(1, keepdim=True)
    grad.addcmul_(unit, along, value=-1).mul_(scale)
    return along


def _add_product(a: Tensor, b: Tensor, out: Tensor, chunk: slice) -> None:
    """``out (+)= a @ b``, set by the first chunk."""
    if chunk.start == 0:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _chunks(rows: int) -> Iterator[slice]:
    for begin in range(0, rows, CHUNK_ROWS):
        yield slice(begin, min(rows, begin + CHUNK_ROWS))
