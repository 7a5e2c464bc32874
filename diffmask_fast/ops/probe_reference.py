"""The oracle of `probe_logits`: one head after the other in plain PyTorch, with the concatenations of the paper.

De Cao et al., "How do decisions emerge across layers in neural models?", EMNLP 2020, section 2.2 and appendix A;
weight normalisation: Salimans and Kingma, NIPS 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The parameters of one gate head that reads F values and is W wide inside.

    The weight of a layer is ``magnitude * direction / norm(direction)``, row by row.
    """

    magnitude: Tensor
    """(W, 1)"""
    direction: Tensor
    """(W, F)"""
    bias: Tensor
    """(W,)"""
    outer_magnitude: Tensor
    """(1, 1)"""
    outer_direction: Tensor
    """(1, W)"""
    offset: Tensor
    """(): the logit of a gate that the rest says nothing about"""


def heads_of(weights: Sequence[Tensor]) -> list[Head]:
    """The heads whose parameters stand one after the other in a flat list."""
    return [Head(*weights[i : i + len(Head._fields)]) for i in range(0, len(weights), len(Head._fields))]


def probe_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64, which is there to check the others by; float32 for everything else."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def head_logits(features: Tensor, head: Head, bound: float | None) -> Tensor:
    """The whole of it: features (R, F) to gate logits (R,)."""
    return _bounded(_hidden_and_raw(features, head)[1], head, bound)


def _hidden_and_raw(features: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The hidden values (R, W), and the logits (R,) before bound and offset."""
    hidden = torch.tanh(features @ normalised(head.magnitude, head.direction).T + head.bias)
    return hidden, hidden @ normalised(head.outer_magnitude, head.outer_direction)[0]


def _bounded(raw: Tensor, head: Head, bound: float | None) -> Tensor:
    return (raw if bound is None else bound * torch.tanh(raw)) + head.offset


def normalised(magnitude: Tensor, direction: Tensor) -> Tensor:
    return magnitude * direction / direction.norm(dim=1, keepdim=True)


def probe_logits_forward(
    first: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    bound: float | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits (..., K) of K heads, and what backward needs of them.

    first (..., H_0) or None, K states (..., H_i), the weights of K heads as `heads_of` takes them apart. Also returns
    the logits (K, R) of the R rows before bound and offset, and, where ``save``, the hidden values (K, R, W).
    """
    dtype = probe_dtype(weights[0])
    logits, raws, hiddens = [], [], []
    for state, head in zip(states, heads_of([weight.to(dtype) for weight in weights]), strict=True):
        hidden, raw = _hidden_and_raw(_features(first, state, dtype), head)
        logits.append(_bounded(raw, head, bound))
        raws.append(raw)
        hiddens.append(hidden if save else hidden.new_empty(0))
    leading = states[0].shape[:-1]
    kept = torch.stack(hiddens) if save else hiddens[0]
    return torch.stack(logits, dim=-1).view(*leading, len(states)), torch.stack(raws), kept


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
    """The gradients for first, states and weights, from the gradient of the logits (..., K).

    Where ``need_first`` or ``need_states`` is false, empty tensors stand for those.
    """
    dtype = probe_dtype(weights[0])
    grads_raw = grad_of_raw(grad.to(dtype), raw, bound)
    heads = heads_of([weight.to(dtype) for weight in weights])
    grad_weights: list[Tensor] = []
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        inside = _grad_before_tanh(grads_raw[i], hidden[i], head)
        inner_grads = _grad_of_norm(inside.T @ _features(first, state, dtype), head.magnitude, head.direction)
        outer_grads = _grad_of_norm((grads_raw[i] @ hidden[i])[None], head.outer_magnitude, head.outer_direction)
        grad_weights += [*inner_grads, inside.sum(0), *outer_grads, grad[..., i].to(dtype).sum()]
    grad_first, grad_states = grads_of_states(grads_raw, first, states, heads, hidden, need_first, need_states)
    return grad_first, grad_states, [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def unavailable() -> None:
    """It runs wherever PyTorch does."""


def grad_of_raw(grad: Tensor, raw: Tensor, bound: float | None) -> Tensor:
    """(K, R): from the gradient of the logits (..., K) to that of the logits before bound and offset."""
    rows = grad.reshape(-1, raw.shape[0]).T.to(raw.dtype).contiguous()
    return rows if bound is None else rows * (bound * (1 - torch.tanh(raw) ** 2))


def grads_of_states(
    grads_raw: Tensor,
    first: Tensor | None,
    states: Sequence[Tensor],
    heads: Sequence[Head],
    hidden: Tensor,
    need_first: bool,
    need_states: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of first and states, empty where not needed, from that of the logits before the bound (K, R)."""
    grad_first, grad_states = states[0].new_empty(0), [state.new_empty(0) for state in states]
    split = 0 if first is None else first.shape[-1]
    left = hidden.new_zeros(hidden.shape[1] if need_first else 0, split)
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        if need_first or need_states:
            weight = normalised(head.magnitude, head.direction)
            inside = _grad_before_tanh(grads_raw[i], hidden[i], head)
            if need_states:
                grad_states[i] = (inside @ weight[:, split:]).to(state.dtype).view(state.shape)
            if need_first:
                left.addmm_(inside, weight[:, :split])
    if need_first:
        assert first is not None
        grad_first = left.to(first.dtype).view(first.shape)
    return grad_first, grad_states


def _grad_before_tanh(grad_raw: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """(R, W)"""
    return grad_raw[:, None] * normalised(head.outer_magnitude, head.outer_direction) * (1 - hidden**2)


def _features(first: Tensor | None, state: Tensor, dtype: torch.dtype) -> Tensor:
    read = state if first is None else torch.cat([first.to(dtype), state.to(dtype)], dim=-1)
    return read.reshape(-1, read.shape[-1]).to(dtype)


def _grad_of_norm(grad: Tensor, magnitude: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of ``normalised(magnitude, direction)`` to those of its two arguments."""
    norm = direction.norm(dim=1, keepdim=True)
    unit = direction / norm
    along = (grad * unit).sum(1, keepdim=True)
    return along, magnitude / norm * (grad - along * unit)
