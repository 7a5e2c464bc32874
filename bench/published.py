"""A step of the published recipe in plain PyTorch, for BERT: two full passes, states concatenated for each site.

What our step is compared with, and timed against. Written from the paper (De Cao et al. 2020, section 2 and appendix).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmask_fast.ops.reference import LEFT, RIGHT, TEMPERATURE
from diffmask_fast.probes import Probe


def gates(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) running products of the gates, and log P(z != 0) of each: a relaxed Bernoulli per gate, stretched,
    clamped, cumulated over all layers."""
    products, opens = [], []
    for k in range(logits.shape[-1]):
        column = logits[..., k]
        law = torch.distributions.RelaxedBernoulli(torch.full_like(column, TEMPERATURE), logits=column)
        clamped = torch.distributions.utils.clamp_probs(u[..., k])
        noise = clamped.log() - (-clamped).log1p()
        s = torch.sigmoid((noise + torch.logit(torch.distributions.utils.clamp_probs(law.probs))) / law.temperature)
        products.append((LEFT + (RIGHT - LEFT) * s).clamp(0, 1))
        opens.append(F.logsigmoid(column - TEMPERATURE * math.log(-LEFT / RIGHT)))
    return torch.stack(products, -1).cumprod(-1), torch.stack(opens, -1)


def states_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """The output and every state, word embedding first."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        return output, [model.get_input_embeddings()(inputs["input_ids"]), *output.hidden_states]


def logits_of(probe: Probe, states: list[Tensor], site: int) -> Tensor:
    """(B, T, K) gate logits, by one small network after the other."""
    columns = []
    for i in probe.reads(site):
        head: Any = probe.heads[i]
        features = torch.cat([states[0], states[i]], -1) if probe.masking == "input" else states[i]
        if head.mean is not None:
            features = (features - head.mean) / head.spread
        logit = head.outer(torch.tanh(head.inner(features))).squeeze(-1)
        columns.append((logit if head.bound is None else head.bound * torch.tanh(logit)) + head.bias)
    return torch.stack(columns, -1)


def masked_output(model: Any, inputs: dict[str, Tensor], site: int, state: Tensor) -> Any:
    """The model's output when `state` stands at a site."""
    if site == 0:
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return model(inputs_embeds=state, **rest)
    layers: nn.ModuleList = model.bert.encoder.layer
    if site <= len(layers):
        hook: Any = layers[site - 1].register_forward_pre_hook(lambda _, args: (state, *args[1:]))
    else:
        hook = layers[-1].register_forward_hook(lambda _, __, o: state if isinstance(o, Tensor) else (state, *o[1:]))
    try:
        return model(**inputs)
    finally:
        hook.remove()


def divergence(original: Any, masked: Any, mask: Tensor) -> Tensor:
    """(B,) KL(original || masked) in nats, of start and end together for spans."""
    total: Any = 0
    for name in ("start_logits", "end_logits") if hasattr(original, "start_logits") else ("logits",):
        p, q = getattr(original, name), getattr(masked, name)
        if name != "logits":
            p, q = p.masked_fill(mask == 0, -1e9), q.masked_fill(mask == 0, -1e9)
        p, q = F.log_softmax(p, -1), F.log_softmax(q, -1)
        total = total + (p.exp() * (p - q)).sum(-1)
    return total


def step(model: Any, probe: Probe, inputs: dict[str, Tensor], site: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """All examples at one site, with the uniforms u (B, T, K): (B,) divergence and (B, T, K) log P(z != 0)."""
    original, states = states_of(model, inputs)
    products, opens = gates(logits_of(probe, states, site), u)
    z, target = products[..., -1:], probe.target(site)
    mixed = z * states[target] + (1 - z) * probe.baseline(site)
    return divergence(original, masked_output(model, inputs, target, mixed), inputs["attention_mask"]), opens


def lagrangian(divergence: Tensor, opens: Tensor, mask: Tensor, multiplier: Tensor, tolerance: float) -> Tensor:
    """(B,) terms of the loss."""
    return (opens.sum(-1) * mask).sum(-1) / mask.sum(-1) + multiplier * (divergence - tolerance)
