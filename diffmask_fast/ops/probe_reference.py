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
    hidden = torch.tanh(features @ normalised(head.magnitude, head.direction).T + head.bias)
    raw = hidden @ normalised(head.outer_magnitude, head.outer_direction)[0]
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
        features = _features(first, state, dtype)
        hidden = torch.tanh(features @ normalised(head.magnitude, head.direction).T + head.bias)
        raw = hidden @ normalised(head.outer_magnitude, head.outer_direction)[0]
        logits.append((raw if bound is None else bound * torch.tanh(raw)) + head.offset)
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
    grad_weights: list[Tensor] = []
    grad_states: list[Tensor] = []
    grad_first = torch.zeros(0, dtype=dtype, device=raw.device)
    split = 0 if first is None else first.shape[-1]
    for i, (state, head) in enumerate(zip(states, heads_of([weight.to(dtype) for weight in weights]), strict=True)):
        outer = normalised(head.outer_magnitude, head.outer_direction)
        inside = grads_raw[i][:, None] * outer * (1 - hidden[i] ** 2)  # before tanh: (R, W)
        inner_grads = _grad_of_norm(inside.T @ _features(first, state, dtype), head.magnitude, head.direction)
        outer_grads = _grad_of_norm((grads_raw[i] @ hidden[i])[None], head.outer_magnitude, head.outer_direction)
        grad_weights += [*inner_grads, inside.sum(0), *outer_grads, grad[..., i].to(dtype).sum()]
        if need_first or need_states:
            grad_features = inside @ normalised(head.magnitude, head.direction)
            if need_states:
                grad_states.append(grad_features[:, split:].reshape(state.shape).to(state.dtype).contiguous())
            if need_first:
                left = grad_features[:, :split]
                grad_first = left.clone() if i == 0 else grad_first + left
    if not need_states:
        grad_states = [state.new_empty(0) for state in states]
    if need_first:
        assert first is not None
        grad_first = grad_first.reshape(first.shape).to(first.dtype)
    else:
        grad_first = states[0].new_empty(0)
    return grad_first, grad_states, [g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)]


def unavailable() -> None:
    """It runs wherever PyTorch does."""


def grad_of_raw(grad: Tensor, raw: Tensor, bound: float | None) -> Tensor:
    """(K, R): from the gradient of the logits (..., K) to that of the logits before bound and offset."""
    rows = grad.reshape(-1, raw.shape[0]).T.to(raw.dtype).contiguous()
    return rows if bound is None else rows * (bound * (1 - torch.tanh(raw) ** 2))


def _features(first: Tensor | None, state: Tensor, dtype: torch.dtype) -> Tensor:
    read = state if first is None else torch.cat([first.to(dtype), state.to(dtype)], dim=-1)
    return read.reshape(-1, read.shape[-1]).to(dtype)


def _grad_of_norm(grad: Tensor, magnitude: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of ``normalised(magnitude, direction)`` to those of its two arguments."""
    norm = direction.norm(dim=1, keepdim=True)
    unit = direction / norm
    along = (grad * unit).sum(1, keepdim=True)
    return along, magnitude / norm * (grad - along * unit)
