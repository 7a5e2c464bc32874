"""What to put in the place of a sampled gate when a model is evaluated: one function, a rule for each project's way."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmask_fast.distributions import HardConcrete

RULES = ("expected", "sigmoid-clamp", "top-k", "straight-through", "round")
FACTOR = 0.8
"""Of the logits in top-k's soft mask (Wang et al., EMNLP 2020, "Structured pruning of large language models")."""


def evaluate(
    logits: Tensor,
    rule: str,
    *,
    temperature: float = 2 / 3,
    left: float = -0.1,
    right: float = 1.1,
    zeros: int | None = None,
    factor: float = FACTOR,
) -> Tensor:
    """Gates of Hard Concrete logits without sampling.

    Args:
        logits: any shape.
        rule: one of
            "expected", the mean E[z];
            "sigmoid-clamp", `clamp(left + (right - left) * sigmoid(logits), 0, 1)`: the gate at temperature 1 and
            a uniform of one half (Louizos et al., ICLR 2018, equation 13);
            "top-k", `sigmoid(factor * logits / temperature)`, the smallest set to 0, as many of all as are expected
            to be 0 (CoFi, LLM-Shearing, Edge-Pruning);
            "straight-through", 1 where the sigmoid-clamp gate is above one half, else 0, with that gate's gradient;
            "round", the same without a gradient.
        temperature, left, right: of the law; by default those of Louizos et al.
        zeros: for "top-k", how many to set to 0 instead.
        factor: for "top-k".

    Returns:
        Gates in [0, 1], the logits' shape.

    Raises:
        ValueError: an unknown rule, or more zeros than there are gates.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(RULES)}")
    if rule == "expected":
        return HardConcrete(logits, temperature, left, right).mean
    if rule == "top-k":
        soft = torch.sigmoid(logits / temperature * factor)
        if zeros is None:
            law = HardConcrete(logits.detach(), temperature, left, right)
            zeros = round(logits.numel() - law.prob_open.sum().item())
        if not 0 <= zeros <= logits.numel():
            raise ValueError(f"zeros is {zeros}, expected 0 to {logits.numel()}, the number of gates")
        smallest = soft.detach().flatten().topk(zeros, largest=False).indices
        return soft.flatten().index_fill(0, smallest, 0.0).view_as(soft)
    gate = (left + (right - left) * torch.sigmoid(logits)).clamp(0, 1)
    if rule == "sigmoid-clamp":
        return gate
    return straight_through(gate) if rule == "straight-through" else (gate > 0.5).to(gate)


def straight_through(gate: Tensor) -> Tensor:
    """1 where a gate is above one half, else 0, with the gradient of the gate."""
    return gate + ((gate > 0.5).to(gate) - gate).detach()
