"""The published formulas in plain PyTorch, written from their description: what the compat modules are compared with.

Slow and simple, for any dtype. Nothing of diffmask_fast is used. Parameters come as a `state_dict` of the published
names; uniforms and logits are clipped where the published code, in float32, clips them (`EPS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TEMPERATURE, LEFT, RIGHT = 0.2, -0.2, 1.0
EPS = 2.0**-23


def draw(u: Tensor, logits: Tensor, temperature: float, left: float, right: float, eps: float = EPS) -> Tensor:
    """A Hard Concrete gate from a uniform: a relaxed Bernoulli sample, stretched and clamped to [0, 1]."""
    u = u.clamp(eps, 1 - eps)
    probs = torch.sigmoid(logits).clamp(eps, 1 - eps)
    noise = u.log() - torch.log1p(-u)
    relaxed = torch.sigmoid((noise + probs.log() - torch.log1p(-probs)) / temperature)
    return (relaxed * (right - left) + left).clamp(0, 1)


def log_nonzero(logits: Tensor, temperature: float, left: float, right: float) -> Tensor:
    """log of 1 - P(z = 0), by the distribution function of the binary concrete law."""
    zero = (0 - left) / (right - left)
    return -torch.nn.functional.softplus((math.log(zero) - math.log(1 - zero)) * temperature - logits)


def layer(parameters: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    g, v = parameters[prefix + ".weight_g"], parameters[prefix + ".weight_v"]
    weight = g * v / v.pow(2).sum(1, keepdim=True).sqrt()
    y = x @ weight.T
    return y + parameters[prefix + ".bias"] if prefix + ".bias" in parameters else y


def network(parameters: Mapping[str, Tensor], prefix: str, x: Tensor, bound: float | None, shift: str) -> Tensor:
    """A gate network: `bound` None for MLPGate, else that of MLPMaxGate, whose trainable shift is named `shift`."""
    y = layer(parameters, f"{prefix}f.2", torch.tanh(layer(parameters, f"{prefix}f.0", x)))
    return y if bound is None else torch.tanh(y) * bound + parameters[prefix + shift]


def mixed(state: Tensor, gates: Tensor, placeholder: Tensor) -> Tensor:
    return state * gates[..., None] + placeholder[:, : state.shape[-2]] * (1 - gates[..., None])


def input_gate(
    parameters: Mapping[str, Tensor],
    states: Sequence[Tensor],
    layer_pred: int | None,
    u: Tensor,
    bound: float | None = 10.0,
    shift: str = "bias",
    eps: float = EPS,
    aggregated: bool = True,
) -> tuple[Tensor, ...]:
    count = len(states) if layer_pred is None else layer_pred + 1
    columns = []
    for i in range(count):
        both = torch.cat([states[0], states[i]], -1)
        columns.append(network(parameters, f"g_hat.{i}.", both, bound, shift))
    return input_masking(states[0], torch.cat(columns, -1), parameters["placeholder"], u, eps, aggregated)


def input_masking(
    state: Tensor, logits: Tensor, placeholder: Tensor, u: Tensor, eps: float = EPS, aggregated: bool = True
) -> tuple[Tensor, ...]:
    """What follows the networks: gates multiply over layers, logs of P(nonzero) add up."""
    gates_full = draw(u, logits, TEMPERATURE, LEFT, RIGHT, eps).cumprod(-1)
    l0_full = log_nonzero(logits, TEMPERATURE, LEFT, RIGHT)
    l0_full = l0_full.cumsum(-1) if aggregated else l0_full
    gates = gates_full[..., -1]
    return mixed(state, gates, placeholder), gates, l0_full[..., -1], gates_full, l0_full


def hidden_gate(
    parameters: Mapping[str, Tensor],
    states: Sequence[Tensor],
    layer_pred: int | None,
    u: Tensor,
    bound: float | None = 10.0,
    eps: float = EPS,
) -> tuple[Tensor, ...]:
    k = 0 if layer_pred is None else layer_pred
    layers = range(len(states)) if layer_pred is None else [k]
    logits = torch.cat([network(parameters, f"g_hat.{i}.", states[i], bound, "bias") for i in layers], -1)
    gates_full = draw(u, logits, TEMPERATURE, LEFT, RIGHT, eps)
    l0_full = log_nonzero(logits, TEMPERATURE, LEFT, RIGHT)
    placeholder = parameters[f"placeholder.{k}"] if f"placeholder.{k}" in parameters else parameters["placeholder"][k]
    gates = gates_full[..., 0]
    return mixed(states[k], gates, placeholder), gates, l0_full[..., 0], gates_full, l0_full


def per_sample_gate(
    parameters: Mapping[str, Tensor], states: Sequence[Tensor], k: int, u: Tensor, eps: float = EPS
) -> tuple[Tensor, ...]:
    logits = parameters["logits"]
    gates_full = draw(u, logits, TEMPERATURE, LEFT, RIGHT, eps)
    l0_full = log_nonzero(logits, TEMPERATURE, LEFT, RIGHT)
    new = mixed(states[k], gates_full[..., k], parameters["placeholder"][:, k])
    return new, gates_full[..., k], l0_full[..., k], gates_full, l0_full
