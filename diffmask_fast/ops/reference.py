"""The oracle: the gate and the mix in plain PyTorch, for any dtype and device, to be read beside the papers.

Louizos et al., "Learning sparse neural networks through L0 regularization", ICLR 2018, equations 10-12, for
the Hard Concrete; De Cao et al., "How do decisions emerge across layers in neural models?", EMNLP 2020, for
the mix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmask_fast.ops.checks import non_finite_error
from diffmask_fast.ops.philox import uniforms as philox_uniforms

TEMPERATURE = 0.2
LEFT = -0.2
RIGHT = 1.0


def hard_concrete(
    uniforms: Tensor,
    logits: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    left: float | Tensor = LEFT,
    right: float | Tensor = RIGHT,
) -> Tensor:
    """The gate that a uniform gives: ``z = clamp(left + (right - left) * s, 0, 1)``, with
    ``s = sigmoid((log u - log(1 - u) + logit) / temperature)``.

    All arguments broadcast; the result has their promoted dtype. ``uniforms`` lie strictly between 0 and 1.
    """
    return stretched_concrete(uniforms, logits, temperature, left, right).clamp(0, 1)


def stretched_concrete(
    uniforms: Tensor, logits: Tensor, temperature: float | Tensor, left: float | Tensor, right: float | Tensor
) -> Tensor:
    """What `hard_concrete` clamps: the binary concrete variable of a uniform, stretched to (left, right)."""
    return _stretch(_concrete_logit(uniforms, logits, temperature).sigmoid(), left, right)


def log_open(
    logits: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    left: float | Tensor = LEFT,
    right: float | Tensor = RIGHT,
) -> Tensor:
    """log P(z != 0) = logsigmoid(logit - temperature * log(-left / right)); arguments broadcast."""
    return F.logsigmoid(logits - _shift(temperature, left, right))


def gate_mix_forward(
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    seed: Tensor,
    temperature: float,
    left: float,
    right: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mixed = z * states + (1 - z) * baseline`` with z the product of the K gates of a row.

    states (..., H), logits (..., K), baseline broadcasting to states, seed int64 (2,). Returns mixed (..., H)
    in the states' dtype, and the running product of the gates and the running sum of log P(z != 0), both
    (..., K).
    """
    if logits.device.type == "cpu":  # elsewhere the question would wait for the device
        bad = ~torch.isfinite(logits)
        if bad.any():
            raise non_finite_error(logits, int(bad.flatten().nonzero()[0]))
    dtype = gate_dtype(logits)
    logits = logits.to(dtype)
    gates = hard_concrete(_row_major_uniforms(seed, logits), logits, temperature, left, right).cumprod(-1)
    opened = log_open(logits, temperature, left, right).cumsum(-1)
    z = gates[..., -1:]
    mixed = z * states.to(dtype) + (1 - z) * baseline.to(dtype)
    return mixed.to(states.dtype).contiguous(), gates, opened


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
    """The gradients for states, logits and baseline, from the inputs of ``gate_mix_forward`` alone.

    A gradient that is ``None`` is zero. Where ``need_states`` or ``need_baseline`` is false an empty tensor
    stands for that result.
    """
    dtype = gate_dtype(logits)
    wide = logits.to(dtype)
    s_logit = _concrete_logit(_row_major_uniforms(seed, wide), wide, temperature)
    stretched = _stretch(s_logit.sigmoid(), left, right)
    gates = stretched.clamp(0, 1)

    running = torch.zeros_like(wide) if grad_gates is None else grad_gates.to(dtype, copy=True)
    grad_states, grad_baseline = states.new_empty(0), baseline.new_empty(0)
    z = gates.prod(-1, keepdim=True)
    if grad_mixed is not None:
        grad = grad_mixed.to(dtype)
        running[..., -1] += (grad * (states.to(dtype) - baseline.to(dtype))).sum(-1)
        if need_states:
            grad_states = (z * grad).to(states.dtype).contiguous()
        if need_baseline:
            grad_baseline = ((1 - z) * grad).sum_to_size(baseline.shape).to(baseline.dtype).contiguous()
    else:
        if need_states:
            grad_states = torch.zeros_like(states, memory_format=torch.contiguous_format)
        if need_baseline:
            grad_baseline = torch.zeros_like(baseline, memory_format=torch.contiguous_format)

    # sigmoid(-x) rather than 1 - sigmoid(x): no cancellation where s is close to 1.
    inside = (stretched > 0) & (stretched < 1)
    slope = (right - left) / temperature * s_logit.sigmoid() * (-s_logit).sigmoid()
    grad_logits = _running_product_gradient(running, gates) * slope.where(inside, 0)
    if grad_log_open is not None:
        later = grad_log_open.to(dtype).flip(-1).cumsum(-1).flip(-1)
        grad_logits = grad_logits + later * (_shift(temperature, left, right) - wide).sigmoid()
    return grad_states, grad_logits.to(logits.dtype), grad_baseline


def unavailable() -> None:
    """It runs wherever PyTorch does."""


def gate_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, which is there to check the others by; float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_major_uniforms(seed: Tensor, logits: Tensor) -> Tensor:
    return philox_uniforms(seed, logits.numel()).view(logits.shape).to(logits.dtype)


def _concrete_logit(uniforms: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
    return (uniforms.log() - (-uniforms).log1p() + logits) / temperature


def _stretch(s: Tensor, left: float | Tensor, right: float | Tensor) -> Tensor:
    return left + (right - left) * s


def _shift(temperature: float | Tensor, left: float | Tensor, right: float | Tensor) -> float | Tensor:
    ratio = -left / right
    return temperature * (ratio.log() if isinstance(ratio, Tensor) else math.log(ratio))


def _running_product_gradient(grad: Tensor, gates: Tensor) -> Tensor:
    """From the gradient of the running product to that of its factors, without dividing by one that may be 0.

    With G_j = z_0 ... z_j:  dz_j = G_{j-1} * S_j,  S_j = dG_j + z_{j+1} * S_{j+1}.
    """
    suffix = grad.clone()
    for j in range(grad.shape[-1] - 2, -1, -1):
        suffix[..., j] += gates[..., j + 1] * suffix[..., j + 1]
    before = torch.ones_like(gates)
    before[..., 1:] = gates[..., :-1].cumprod(-1)
    return before * suffix
