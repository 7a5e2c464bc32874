"""`gate_mix` under autograd, torch.compile, autocast and activation checkpointing."""

from __future__ import annotations

import interpreter
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffmask_fast.ops import gate_mix

BACKENDS = ("reference", "cpu", "triton") if interpreter.ON else ("reference", "cpu")
LAW = (0.2, -0.2, 1.0)


def loss(result):
    return (result.mixed**2).sum() + (result.gates**2).sum() + result.log_open.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_finds_nothing_wrong_with_the_operators(case, backend):
    inputs = case()
    gate_mix(*inputs, backend=backend)  # loads it
    torch.library.opcheck(torch.ops.diffmask_fast.gate_mix.default, (*inputs, *LAW, backend))
    plain = [t.detach() for t in inputs]
    grads = [torch.randn_like(t) for t in (plain[0], plain[1], plain[1])]
    for need_states, need_baseline in ((True, True), (False, False)):
        arguments = (*grads, *plain, *LAW, backend, need_states, need_baseline)
        torch.library.opcheck(torch.ops.diffmask_fast.gate_mix_backward.default, arguments)
    torch.library.opcheck(
        torch.ops.diffmask_fast.gate_mix_backward.default,
        (None, None, None, *plain, *LAW, backend, True, True),
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_takes_it_whole_and_gives_the_eager_bits(case, backend, dynamic):
    inputs = case()

    def step(*inputs):
        result = gate_mix(*inputs, backend=backend)
        return loss(result), result

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for (eager, result), (ours, mine) in [(step(*inputs), compiled(*inputs))]:
        assert all(torch.equal(a, b) for a, b in zip(result, mine, strict=True))
        expected = torch.autograd.grad(eager, inputs[:3])
        assert all(torch.equal(a, b) for a, b in zip(expected, torch.autograd.grad(ours, inputs[:3]), strict=True))


@pytest.mark.slow
def test_inductor_takes_it_whole_and_draws_a_new_seed_each_call(case):
    inputs = case()[:3]
    compiled = torch.compile(lambda *inputs: gate_mix(*inputs), fullgraph=True)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first.gates, second.gates)
    z = second.gates[..., -1:]
    # forward and backward of one call have the same gates: d sum(mixed) / d states is z
    (grad,) = torch.autograd.grad(second.mixed.sum(), inputs[0])
    assert torch.equal(grad, z.expand_as(grad))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_changes_no_gradient(case, reentrant, backend):
    inputs = case()[:3]

    def block(*inputs):
        return loss(gate_mix(*inputs, backend=backend))

    torch.manual_seed(11)
    expected = torch.autograd.grad(block(*inputs), inputs)
    torch.manual_seed(11)
    checkpoint(block, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_dtypes_and_bits_alone(case, backend):
    inputs = case()
    plain = gate_mix(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        result = gate_mix(*inputs, backend=backend)
        mixed = gate_mix(inputs.states.bfloat16(), inputs.logits.bfloat16(), *inputs[2:], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, result, strict=True))
    assert [t.dtype for t in mixed] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_a_clear_error(case, backend):
    inputs = case()
    (grad,) = torch.autograd.grad(loss(gate_mix(*inputs, backend=backend)), inputs.logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
