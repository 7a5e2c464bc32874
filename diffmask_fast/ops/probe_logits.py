"""`probe_logits`, the gate logits of all sites in one call, as PyTorch knows it: door, schema, shapes, gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.ops import backends
from diffmask_fast.ops.checks import check_probe_logits
from diffmask_fast.ops.probe_reference import Head, heads_of, probe_dtype


def probe_logits(
    states: Sequence[Tensor],
    heads: Sequence[Head],
    first: Tensor | None = None,
    *,
    bound: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The logits of K gates for each token, from K states and a gate head for each.

    Head i reads ``[first; states[i]]``, or ``states[i]`` alone without ``first``: weight-normed Linear - tanh -
    weight-normed Linear, then ``bound * tanh(.)`` where there is a bound, plus the head's offset (De Cao et al. 2020,
    section 2.2 and appendix A). Nothing is concatenated: the first weight is split, and the norm of a weight's row is
    multiplied to the product with it.

    Args:
        states: K tensors (..., H_i), alike but for their width; float32, bfloat16 or float16, or float64 to check the
            others by (reference backend). Any strides.
        heads: K heads; head i has a direction (W, H_i), or (W, H_0 + H_i) with ``first``. W is the same for all.
            Floating point, all of one dtype; float64 if and only if the states are.
        first: (..., H_0), which every head reads first (input masking); None for hidden masking.
        bound: a number above 0, or None.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"`` (see ``backends``).

    Returns:
        (..., K), contiguous, float32 (float64 for float64 input). Gradients flow to the heads and, if they require it,
        to first and states; a second derivative raises RuntimeError.

    Everything but the states is computed in float32, also under autocast, which leaves the op alone. Kept for backward
    are the inputs and the hidden values, (K, rows, W) in float32; without gradient nothing is.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or numbers.
        RuntimeError: a backend asked for by name that can't run.
    """
    states, heads = list(states), list(heads)
    check_probe_logits(states, heads, first, bound)
    weights = [weight for head in heads for weight in head]
    inputs = [*states, *weights] if first is None else [first, *states, *weights]
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    chosen = backends.choose(backend, states[0].device.type, states[0].dtype, "probe_logits")
    op = torch.ops.diffmask_fast.probe_logits.default
    return op(first, states, weights, None if bound is None else float(bound), save, chosen)[0]


_library = torch.library.Library("diffmask_fast", "FRAGMENT")
_library.define(
    "probe_logits(Tensor? first, Tensor[] states, Tensor[] weights, float? bound, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.define(
    "probe_logits_backward(Tensor grad, Tensor? first, Tensor[] states, Tensor[] weights, Tensor raw, Tensor hidden, "
    "float? bound, bool need_first, bool need_states, str backend) -> (Tensor, Tensor[], Tensor[])",
    tags=[torch.Tag.pt2_compliant_tag],
)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend = inputs
    return backends.load(backend, "probe_logits").probe_logits_forward(*arguments)


def _backward(*inputs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *arguments, backend = inputs
    return backends.load(backend, "probe_logits").probe_logits_backward(*arguments)


_library.impl("probe_logits", _forward, "CompositeExplicitAutograd")
_library.impl("probe_logits_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("diffmask_fast::probe_logits")
def _forward_fake(
    first: Tensor | None, states: list[Tensor], weights: list[Tensor], bound: float | None, save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    leading, count = states[0].shape[:-1], len(states)
    width = heads_of(weights)[0].bias.shape[0]
    dtype = probe_dtype(weights[0])
    rows = leading.numel()
    return (
        states[0].new_empty((*leading, count), dtype=dtype),
        states[0].new_empty((count, rows), dtype=dtype),
        states[0].new_empty((count, rows, width) if save else (0,), dtype=dtype),
    )


@torch.library.register_fake("diffmask_fast::probe_logits_backward")
def _backward_fake(
    grad: Tensor, first: Tensor | None, states: list[Tensor], weights: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *_, need_first, need_states, _ = rest
    return (
        first.new_empty(first.shape) if first is not None and need_first else states[0].new_empty(0),
        [state.new_empty(state.shape if need_states else (0,)) for state in states],
        [weight.new_empty(weight.shape) for weight in weights],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first, states, weights, ctx.bound, save, ctx.backend = inputs
    _, raw, hidden = output
    ctx.mark_non_differentiable(raw, hidden)
    ctx.counts = (len(states), len(weights))
    ctx.set_materialize_grads(False)
    if save:
        ctx.save_for_backward(first, *states, *weights, raw, hidden)


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    count, heads = ctx.counts
    if grad is None:
        return None, [None] * count, [None] * heads, None, None, None
    first, *rest, raw, hidden = ctx.saved_tensors
    states, weights = rest[:count], rest[count:]
    need_first, need_states, need_weights = ctx.needs_input_grad[:3]
    results = torch.ops.diffmask_fast.probe_logits_backward.default(
        grad, first, states, weights, raw, hidden, ctx.bound, need_first, any(need_states), ctx.backend
    )
    return (
        results[0] if need_first else None,
        _needed(results[1], need_states),
        _needed(results[2], need_weights),
        *(None,) * 3,
    )


def _needed(grads: list[Tensor], needed: list[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "probe_logits has no second derivative. Take its gradient without create_graph=True, or write the head with "
        "diffmask_fast.ops.probe_reference.head_logits, which PyTorch can differentiate twice"
    )


torch.library.register_autograd("diffmask_fast::probe_logits", _gradient, setup_context=_save)
torch.library.register_autograd("diffmask_fast::probe_logits_backward", _no_second_derivative)
