"""The CUDA backend: loads the library, plans how rows are found and shared out, allocates what it fills.

On a GPU a logit that isn't finite can't be reported without waiting for the device: its row of the results becomes
NaN, and so do the gradients that it has a part in.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from diffmask_fast.ops.layout import Layout, ceil_divide, plan

_OLDEST_TORCH = (2, 10)
_NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice
CHUNK_COLUMNS = 1024  # of csrc/gate_mix_cuda.h

# Rows that share a baseline are cut into parts that are summed on their own: not so short that the parts' sums become
# much of what is moved, not so long that fewer than about BLOCKS of them work on a large input. It follows from shapes
# alone, so that every GPU adds in the same order.
SHORTEST_PART = 16
BLOCKS = 512


@functools.cache
def unavailable() -> str | None:
    """None once the library is loaded, else the reason why it can't be."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return f"it needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer, and this is {torch.__version__}"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU here"
    paths = sorted(Path(__file__).parent.parent.glob("_cuda*.so"))
    if not paths:
        return (
            "diffmask_fast was installed without its CUDA library. With nvcc and a CUDA build of torch installed, "
            "run in its source folder: pip install --force-reinstall --no-deps --no-build-isolation ."
        )
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        return f"{paths[0].name} could not be loaded: {error.__cause__ or error}"
    number = torch.ops.diffmask_fast.gate_mix_cuda_error()
    if number == _NO_KERNEL_IMAGE:
        architecture = "{}.{}".format(*torch.cuda.get_device_capability())
        return (
            f"{paths[0].name} was built for other GPUs than this one; to build it for this one, install it again "
            f"with TORCH_CUDA_ARCH_LIST={architecture}"
        )
    return None if number == 0 else f"CUDA error {number} where its kernels are looked for"


def gate_mix_forward(
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    seed: Tensor,
    temperature: float,
    left: float,
    right: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = plan(states, _wide(baseline))
    gate_logits = _wide(logits).contiguous()
    mixed = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    gates, log_open = torch.empty_like(gate_logits), torch.empty_like(gate_logits)
    torch.ops.diffmask_fast.gate_mix_forward_cuda(
        layout.states,
        gate_logits,
        layout.baseline,
        seed.contiguous(),
        temperature,
        left,
        right,
        layout.numbers(),
        mixed,
        gates,
        log_open,
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
    with_mixed = grad_mixed is not None
    layout = plan(states, _wide(baseline), None if grad_mixed is None else grad_mixed.to(states.dtype))
    gate_logits = _wide(logits).contiguous()
    grad_states = _new(states, states.shape if need_states else (0,), with_mixed)
    # One row for each group: that is the baseline, unless it had to be expanded for the layout.
    grad_baseline = _new(layout.baseline, layout.baseline.shape if need_baseline else (0,), with_mixed)
    grad_logits = torch.empty_like(gate_logits)
    members = part_members(layout)
    parts, chunks = ceil_divide(layout.members, members), ceil_divide(states.shape[-1], CHUNK_COLUMNS)
    with_parts = with_mixed and need_baseline and parts > 1
    torch.ops.diffmask_fast.gate_mix_backward_cuda(
        layout.grad,
        None if grad_gates is None else _wide(grad_gates).contiguous(),
        None if grad_log_open is None else _wide(grad_log_open).contiguous(),
        layout.states,
        gate_logits,
        layout.baseline,
        seed.contiguous(),
        temperature,
        left,
        right,
        layout.numbers(),
        members,
        grad_logits.new_empty(chunks * layout.rows if with_mixed else 0),
        grad_logits.new_empty(parts * layout.baseline.numel() if with_parts else 0),
        grad_states,
        grad_logits,
        grad_baseline,
    )
    if need_baseline and grad_baseline.shape != baseline.shape:
        grad_baseline = grad_baseline.sum_to_size(baseline.shape)
    return grad_states, grad_logits.to(logits.dtype), grad_baseline.to(baseline.dtype)


def part_members(layout: Layout) -> int:
    """How many of the rows that share a baseline one block of the first backward kernel adds up."""
    return max(SHORTEST_PART, ceil_divide(layout.rows, BLOCKS))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _new(like: Tensor, shape: tuple[int, ...], filled: bool) -> Tensor:
    """Without a gradient of mixed nothing is written to the gradients of states and baseline: they are zero."""
    make = torch.empty if filled else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)
