"""`gate_mix`, the fused operation, as PyTorch knows it: door, schema, shapes, gradient, dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmask_fast.ops import backends
from diffmask_fast.ops.checks import check_gate_mix, check_law
from diffmask_fast.ops.philox import draw_seed
from diffmask_fast.ops.reference import LEFT, RIGHT, TEMPERATURE, gate_dtype


class GateMix(NamedTuple):
    """What `gate_mix` returns: ``mixed`` (..., H), ``gates`` (..., K) and ``log_open`` (..., K)."""

    mixed: Tensor
    gates: Tensor
    log_open: Tensor


def gate_mix(
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    seed: Tensor | None = None,
    *,
    temperature: float = TEMPERATURE,
    left: float = LEFT,
    right: float = RIGHT,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> GateMix:
    """Draw K Hard Concrete gates for each state, and mix it with the baseline by their product, in one pass.

    ``mixed = z * states + (1 - z) * baseline``, with z the product of the row's gates: where z is 0 the state
    is replaced by the baseline, where it is 1 it stays (De Cao et al. 2020; the gates: Louizos et al. 2018).

    Args:
        states: (..., H) with at least one dim before H; float32, bfloat16, float16, or float64 to check the
            others by (reference backend). The last dim has stride 1, other dims any stride.
        logits: (..., K), the states' leading dims, K >= 1; any floating point dtype.
        baseline: (H,), or (..., H) with leading dims that are 1 or the states' own; float32 or the states'
            dtype.
        seed: int64 (2,), the stream that the gates are drawn from (see ``philox``). The same seed gives the
            same gates on every backend. Without it ``draw_seed(generator)`` draws one.
        temperature, left, right: of the Hard Concrete; temperature > 0, left < 0, right >= 1.
        generator: where the seed is drawn from, if not PyTorch's global generator. Activation checkpointing
            replays the global one only: inside a checkpointed function, give ``seed`` or neither.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"`` (see ``backends``).

    Returns:
        ``GateMix(mixed, gates, log_open)``: ``mixed`` contiguous, in the states' dtype; ``gates`` the running
        product and ``log_open`` the running sum of log P(gate != 0) over the last dim, float32 (float64 for
        float64 input). Gradients flow from all three to logits, baseline and, if they require it, states.
        They can be taken once: a second derivative raises RuntimeError.

    Gates are computed in float32 whatever the states' dtype, also under autocast, which leaves the op alone.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, devices or numbers; on the CPU also a logit that isn't
            finite.
        RuntimeError: a backend asked for by name that can't run.

    Example:
        >>> states, logits, baseline = torch.randn(2, 5, 8), torch.zeros(2, 5, 1), torch.zeros(8)
        >>> gate_mix(states, logits, baseline).mixed.shape
        torch.Size([2, 5, 8])
    """
    check_law(temperature, left, right)
    check_gate_mix(states, logits, baseline, seed, generator)
    if seed is None:
        seed = draw_seed(generator, states.device)
    chosen = backends.choose(backend, states.device.type, states.dtype)
    law = (float(temperature), float(left), float(right))
    return GateMix(*torch.ops.diffmask_fast.gate_mix.default(states, logits, baseline, seed, *law, chosen))


_LAW = "float temperature, float left, float right, str backend"
_INPUTS = f"Tensor states, Tensor logits, Tensor baseline, Tensor seed, {_LAW}"
_library = torch.library.Library("diffmask_fast", "FRAGMENT")
_library.define(f"gate_mix({_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=[torch.Tag.pt2_compliant_tag])
_library.define(
    f"gate_mix_backward(Tensor? grad_mixed, Tensor? grad_gates, Tensor? grad_log_open, {_INPUTS}, "
    "bool need_states, bool need_baseline) -> (Tensor, Tensor, Tensor)",
    tags=[torch.Tag.pt2_compliant_tag],
)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend = inputs
    return backends.load(backend).gate_mix_forward(*arguments)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend, need_states, need_baseline = inputs
    return backends.load(backend).gate_mix_backward(*arguments, need_states, need_baseline)


_library.impl("gate_mix", _forward, "CompositeExplicitAutograd")
_library.impl("gate_mix_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("diffmask_fast::gate_mix")
def _forward_fake(states: Tensor, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    gates = logits.new_empty(logits.shape, dtype=gate_dtype(logits))
    return states.new_empty(states.shape), gates, torch.empty_like(gates)


@torch.library.register_fake("diffmask_fast::gate_mix_backward")
def _backward_fake(
    grad_mixed: Tensor | None,
    grad_gates: Tensor | None,
    grad_log_open: Tensor | None,
    states: Tensor,
    logits: Tensor,
    baseline: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_states, need_baseline = rest
    return (
        states.new_empty(states.shape if need_states else (0,)),
        logits.new_empty(logits.shape),
        baseline.new_empty(baseline.shape if need_baseline else (0,)),
    )


class _GateMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        # The inputs alone are kept: backward draws the gates again from the seed.
        ctx.save_for_backward(*inputs[:4])
        ctx.rest = inputs[4:]
        ctx.set_materialize_grads(False)
        return _below_autograd(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_states, need_logits, need_baseline = ctx.needs_input_grad[:3]
        results = torch.ops.diffmask_fast.gate_mix_backward.default(
            *grads, *ctx.saved_tensors, *ctx.rest, need_states, need_baseline
        )
        needed = (need_states, need_logits, need_baseline)
        return (*(result if need else None for result, need in zip(results, needed, strict=True)), *(None,) * 5)


def _below_autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmask_fast.gate_mix.default(*inputs)


def _autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3])
    return _GateMix.apply(*inputs) if wanted else _below_autograd(*inputs)


class _GateMixBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward_below_autograd(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            "gate_mix has no second derivative. Take its gradient without create_graph=True, or write the gate "
            "with diffmask_fast.ops.reference.hard_concrete, which PyTorch can differentiate twice"
        )


def _backward_below_autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.diffmask_fast.gate_mix_backward.default(*inputs)


def _backward_autograd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted = torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs)
    return _GateMixBackward.apply(*inputs) if wanted else _backward_below_autograd(*inputs)


# torch.library.register_autograd makes the same of any schema, and takes 40 microseconds more: a fifth of a small call.
_library.impl("gate_mix", _autograd, "Autograd")
_library.impl("gate_mix_backward", _backward_autograd, "Autograd")
