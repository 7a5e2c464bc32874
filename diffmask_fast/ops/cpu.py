"""The C++ backend: loads the library, allocates what it fills."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from diffmask_fast.ops.checks import non_finite_error
from diffmask_fast.ops.layout import unit_stride

_OLDEST_TORCH = (2, 10)


@functools.cache
def unavailable() -> str | None:
    """None once the library is loaded, else the reason why it can't be."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        return f"it needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer, and this is {torch.__version__}"
    paths = sorted(Path(__file__).parent.parent.glob("_cpp*.so"))
    if not paths:
        return (
            "diffmask_fast was installed without its C++ library. With a C++ compiler and torch installed, "
            "run in its source folder: pip install --force-reinstall --no-deps --no-build-isolation ."
        )
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        return f"{paths[0].name} could not be loaded: {error}"
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
    states, gate_logits = unit_stride(states), _plain(logits)
    mixed = torch.empty(states.shape, dtype=states.dtype)
    gates, log_open = torch.empty_like(gate_logits), torch.empty_like(gate_logits)
    bad = torch.ops.diffmask_fast.gate_mix_forward_cpu(
        states,
        gate_logits,
        _plain(baseline),
        seed.contiguous(),
        temperature,
        left,
        right,
        mixed,
        gates,
        log_open,
    )
    if bad >= 0:
        raise non_finite_error(logits, bad)
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
    # Without a gradient of mixed nothing is written to these two.
    new = torch.empty if grad_mixed is not None else torch.zeros
    gate_logits = _plain(logits)
    grad_states = new(states.shape if need_states else (0,), dtype=states.dtype)
    grad_baseline = new(baseline.shape if need_baseline else (0,), dtype=torch.float32)
    grad_logits = torch.empty_like(gate_logits)
    torch.ops.diffmask_fast.gate_mix_backward_cpu(
        None if grad_mixed is None else unit_stride(grad_mixed.to(states.dtype)),
        None if grad_gates is None else _plain(grad_gates),
        None if grad_log_open is None else _plain(grad_log_open),
        unit_stride(states),
        gate_logits,
        _plain(baseline),
        seed.contiguous(),
        temperature,
        left,
        right,
        grad_states,
        grad_logits,
        grad_baseline,
    )
    return grad_states, grad_logits.to(logits.dtype), grad_baseline.to(baseline.dtype)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
