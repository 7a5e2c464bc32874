"""The Triton backend of `probe_logits`: makes the table that the kernels read, allocates what they fill, launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.ops import triton
from diffmask_fast.ops.layout import ceil_divide, flat_rows
from diffmask_fast.ops.probe_reference import grad_of_raw, grads_of_states, heads_of

# Products in three tf32 parts are as exact as in float32, and several times faster on tensor cores.
PRECISION = "tf32x3"
ALIGN = 16  # bytes that a thread loads at once
# The largest that spill no register on the GPUs of the last three generations.
FORWARD_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}
FEW_ROWS_BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 16}
BACKWARD_BLOCKS = {"BLOCK_W": 64, "BLOCK_H": 128, "BLOCK_R": 32}
NORM_BLOCKS = {"BLOCK_W": 4, "BLOCK_F": 512}
NORM_BACKWARD_BLOCKS = {"BLOCK_F": 1024}
WARPS, NORM_WARPS = 8, 4


def unavailable() -> str | None:
    return triton.unavailable()


def probe_logits_forward(
    first: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    bound: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from diffmask_fast.kernels import probe_logits as kernels

    sites = Sites(first, states, weights)
    table = sites.table()
    leading, device = states[0].shape[:-1], states[0].device
    logits = torch.empty(*leading, sites.sites, device=device)
    raw = torch.empty(sites.sites, sites.count, device=device)
    hidden = torch.empty((sites.sites, sites.count, sites.width) if save else (0,), device=device)
    scale = torch.empty(sites.sites, sites.width, device=device)
    kernels.probe_norms[(sites.sites, ceil_divide(sites.width, NORM_BLOCKS["BLOCK_W"]))](
        table, scale, sites.first_size, sites.width, **NORM_BLOCKS, num_warps=NORM_WARPS
    )
    many = sites.sites * sites.count >= FORWARD_BLOCKS["BLOCK_M"] * _processors(device)
    blocks = FORWARD_BLOCKS if many else FEW_ROWS_BLOCKS
    kernels.probe_forward[(ceil_divide(sites.count, blocks["BLOCK_M"]), sites.sites)](
        table, scale, *sites.first, logits, raw, hidden, *sites.numbers(bound),
        SAVE=save, **sites.constants(bound), **blocks, num_warps=WARPS,
    )  # fmt: skip
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
    from diffmask_fast.kernels import probe_logits as kernels

    sites = Sites(first, states, weights)
    grads = [torch.empty_like(weight) for weight in sites.weights]
    table = sites.table(grads)
    products = torch.empty(sites.sites, sites.width, device=grad.device)
    blocks = BACKWARD_BLOCKS
    columns = ceil_divide(sites.first_size, blocks["BLOCK_H"]) + ceil_divide(max(sites.sizes), blocks["BLOCK_H"])
    kernels.probe_backward[(columns, ceil_divide(sites.width, blocks["BLOCK_W"]), sites.sites)](
        table, *sites.first, grad.float().contiguous(), raw, hidden, products, *sites.numbers(bound),
        **sites.constants(bound), **blocks, num_warps=WARPS,
    )  # fmt: skip
    kernels.probe_norms_backward[(sites.width + 1, sites.sites)](
        table, products, sites.first_size, sites.width, ALIGN=sites.align, **NORM_BACKWARD_BLOCKS, num_warps=NORM_WARPS
    )
    grad_first, grad_states = states[0].new_empty(0), [state.new_empty(0) for state in states]
    if need_first or need_states:
        # DiffMask's states come from a frozen model and need none: this is left to PyTorch's matrix products.
        grads_raw = grad_of_raw(grad, raw, bound)
        grad_first, grad_states = grads_of_states(
            grads_raw, first, states, heads_of(sites.weights), hidden, need_first, need_states
        )
    return grad_first, grad_states, [g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]


class Sites:
    """The tensors of all sites as the kernels take them: last stride 1, addresses whole multiples of 16 bytes."""

    def __init__(self, first: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.states = [_aligned(flat_rows(state)) for state in states]
        self.weights = [_aligned(weight.float().contiguous()) for weight in weights]
        self.sites, self.count = len(states), len(self.states[0])
        self.width = len(heads_of(self.weights)[0].bias)
        self.sizes = [state.shape[1] for state in self.states]
        rows = self.states[0] if first is None else _aligned(flat_rows(first))
        self.first_size = 0 if first is None else rows.shape[1]
        self.first = (rows, rows.stride(0), self.first_size)
        lengths = [self.first_size, *self.sizes, *(state.stride(0) for state in (rows, *self.states))]
        self.align = ALIGN if all(length % ALIGN == 0 for length in lengths) else 1

    def table(self, grads: Sequence[Tensor] = ()) -> Tensor:
        """A row of numbers for each site, as the kernels' FIELDS."""
        heads = heads_of([*self.weights])
        filled = heads_of([*grads]) if grads else heads  # forward reads no gradient
        numbers: list[int] = []
        for state, head, grad in zip(self.states, heads, filled, strict=True):
            numbers += [state.data_ptr(), state.stride(0), state.shape[1]]
            numbers += [tensor.data_ptr() for tensor in (*head, *grad)]
        return _on_device(tuple(numbers), self.states[0].device)

    def numbers(self, bound: float | None) -> tuple[int | float, ...]:
        return self.count, self.width, self.sites, bound or 0.0

    def constants(self, bound: float | None) -> dict[str, Any]:
        import triton.language as tl

        return {
            "FIRST": self.first_size > 0,
            "BOUND": bound is not None,
            "STATE": getattr(tl, str(self.states[0].dtype).removeprefix("torch.")),
            "ALIGN": self.align,
            "INNER": 1 << (self.width - 1).bit_length(),
            "PRECISION": PRECISION,
        }


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # Memory is used again from step to step, so most steps find their table here and copy nothing to the GPU.
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGN == 0 else tensor.clone()
