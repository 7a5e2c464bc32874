"""What `gate_mix` promises, for each backend; the oracle is the reference in float64."""

from __future__ import annotations

import interpreter
import numpy as np
import pytest
import torch
from torch import Tensor

from diffmask_fast.ops import gate_mix, reference

# Triton's interpreter runs its kernels on the CPU, in a process that was started for it: see the Makefile.
FAST = ("cpu", "triton") if interpreter.ON else ("cpu",)
BACKENDS = ("reference", *FAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# leading dims, H, K, baseline
SHAPES = [
    ((3, 7), 37, 4, (37,)),
    ((3, 7), 37, 4, (7, 37)),
    ((3, 7), 16, 13, (1, 7, 16)),
    ((3, 7), 33, 1, (3, 1, 33)),
    ((3, 7), 15, 2, (3, 7, 15)),
    ((2, 3, 70), 8, 3, (2, 1, 70, 8)),
    ((2, 150), 64, 26, (2, 1, 64)),
    ((1,), 1, 1, (1,)),
    ((300,), 129, 5, (129,)),
    ((1, 9), 600, 3, (1, 9, 600)),
]


def run(case, backend, grads=None, **law):
    """(mixed, gates, log_open, and the gradients of states, logits and baseline)."""
    inputs = case[:3]
    outputs = gate_mix(*case, backend=backend, **law)
    grads = grads or gradients(outputs)
    return (
        *outputs,
        *torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]),
    )


def gradients(outputs):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]


def in_float64(case):
    return type(case)(*(t.detach().double().requires_grad_() for t in case[:3]), case.seed)


def assert_as_good_as_reference(ours: Tensor, plain: Tensor, exact: Tensor, eps: float) -> None:
    """The error against float64 is at most twice that of plain PyTorch in the same precision, and a rounding
    or two."""
    error = (ours.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_a_backend_is_as_close_to_float64_as_the_reference_is(case, shape, dtype, backend):
    inputs = case(*shape, dtype=dtype)
    grads = gradients(gate_mix(*inputs))
    exact = run(in_float64(inputs), "reference", grads)
    plain = run(inputs, "reference", grads)
    ours = run(inputs, backend, grads)
    for mine, theirs, oracle in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert_as_good_as_reference(mine, theirs, oracle, torch.finfo(mine.dtype).eps)


@pytest.mark.parametrize("law", [(2 / 3, -0.1, 1.1), (1 / 3, -0.2, 1.0), (0.05, -1.0, 2.0)])
@pytest.mark.parametrize("backend", FAST)
def test_a_backend_follows_every_law(case, law, backend):
    names = dict(zip(("temperature", "left", "right"), law, strict=True))
    inputs = case((4, 50), 8, 3)
    grads = gradients(gate_mix(*inputs))
    exact = run(in_float64(inputs), "reference", grads, **names)
    plain = run(inputs, "reference", grads, **names)
    for mine, theirs, oracle in zip(run(inputs, backend, grads, **names), plain, exact, strict=True):
        assert_as_good_as_reference(mine, theirs, oracle, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_a_backend_mixes_with_the_bits_of_the_formula_given_its_gates(case, dtype, backend):
    inputs = case((5, 40), 70, 3, dtype=dtype)
    mixed, gates, _ = gate_mix(*inputs, backend=backend)
    z = gates[..., -1:]
    assert torch.equal(mixed, (z * inputs.states.float() + (1 - z) * inputs.baseline).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_gives_the_baseline_bit_for_bit(case, backend):
    inputs = case((5, 40), 6, 3)
    mixed, gates, _ = gate_mix(*inputs, backend=backend)
    closed = gates[..., -1] == 0
    assert closed.any()
    assert torch.equal(mixed[closed], inputs.baseline.expand(int(closed.sum()), -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gates_are_those_of_the_stream_contract(case, backend):
    inputs = case((2, 9), 3, 1)
    _, gates, _ = gate_mix(*inputs, backend=backend)
    u = reference.philox_uniforms(inputs.seed, 18).view(2, 9, 1).double()
    expected = reference.hard_concrete(u, inputs.logits.double())
    # noise up to 17 and temperature 0.2: the condition of z in float32 is about 17 / 0.2 / 4 roundings
    assert (gates.double() - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_products_and_sums_run_over_the_last_dim(case, backend):
    inputs = case((2, 9), 3, 5)
    _, gates, opened = gate_mix(*inputs, backend=backend)
    assert (gates[..., 1:] <= gates[..., :-1]).all()
    assert (opened[..., 1:] <= opened[..., :-1]).all()
    single = reference.log_open(inputs.logits.double())
    torch.testing.assert_close(opened.double(), single.cumsum(-1), rtol=5 * 2**-23, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_gives_the_same_gates_and_another_seed_others(case, backend):
    inputs = case((20, 20), 4, 2)
    gates = gate_mix(*inputs, backend=backend).gates
    assert torch.equal(gates, gate_mix(*inputs, backend=backend).gates)
    for moved in ([0, 1], [1, 0]):
        other = gate_mix(*inputs[:3], inputs.seed + torch.tensor(moved), backend=backend).gates
        assert not torch.equal(gates, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_seed_nothing_else_is_drawn(case, backend):
    state = torch.get_rng_state()
    gate_mix(*case(), backend=backend).mixed.sum().backward()
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_seed_the_global_generator_decides(case):
    inputs = case()[:3]
    torch.manual_seed(1)
    first, second = gate_mix(*inputs).gates, gate_mix(*inputs).gates
    torch.manual_seed(1)
    assert torch.equal(first, gate_mix(*inputs).gates)
    assert not torch.equal(first, second)


def test_a_generator_decides_where_it_is_given(case):
    inputs = case()[:3]
    draws = [gate_mix(*inputs, generator=torch.Generator().manual_seed(2)).gates for _ in range(2)]
    assert torch.equal(*draws)


def test_same_seed_gives_the_same_bits_for_one_and_two_threads(case):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    result
                    for baseline in ((65,), (150, 65), (7, 1, 65))
                    for result in run(case((7, 150), 65, 5, baseline), "cpu")
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_states_with_any_outer_strides_give_what_their_copy_gives(case, dtype, backend):
    big = case((9, 5, 4), 80, 2, dtype=dtype)
    view = big.states[1:8, 2:, 1:3, 17:60].transpose(0, 1)
    _, logits, baseline, _ = case((3, 7, 2), 43, 2)
    assert not view.is_contiguous()
    for states in (view, view.contiguous()):
        inputs = (
            states.detach().requires_grad_(),
            logits.detach().requires_grad_(),
            baseline.detach().requires_grad_(),
        )
        outputs = gate_mix(*inputs, big.seed, backend=backend)
        grads = gradients(outputs)
        result = (*outputs, *torch.autograd.grad(outputs, inputs, grads))
        if states is view:
            first = result
    assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_with_any_strides_gives_what_its_copy_gives(case, backend):
    inputs = case((3, 6), 10, 2)
    mixed = gate_mix(*inputs, backend=backend).mixed
    for grad in (torch.ones(1, 1, 1).expand_as(mixed), torch.randn(10, 6, 3).permute(2, 1, 0)):
        strided = torch.autograd.grad(mixed, inputs[:3], grad, retain_graph=True)
        plain = torch.autograd.grad(mixed, inputs[:3], grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", range(3))
def test_each_output_alone_has_the_gradients_of_the_formula(case, backend, output):
    inputs = case((3, 20), 6, 3)
    exact = in_float64(inputs)
    reference_output = gate_mix(*exact, backend="reference")[output]
    ours = gate_mix(*inputs, backend=backend)[output]
    grad = gradients([ours])[0]
    expected = torch.autograd.grad(reference_output, exact[:3], grad.double(), allow_unused=True)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs[:3], grad, allow_unused=True), expected, strict=True):
        # As above: the condition of the slope is that of z / temperature.
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_made_only_for_what_requires_them(case, backend):
    every = run(case(), backend)[3:]
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(case()[:3])]
        outputs = gate_mix(*inputs, case().seed, backend=backend)
        torch.autograd.backward(outputs, gradients(outputs))
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
        assert torch.equal(inputs[wanted].grad, every[wanted])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", [-3e38, -1e4, -100.0, 100.0, 1e4, 3e38])
def test_extreme_logits_give_finite_gates_and_gradients(case, backend, extreme):
    inputs = case((4, 5), 6, 1)
    logits = torch.full_like(inputs.logits, extreme).requires_grad_()
    results = run(inputs._replace(logits=logits), backend)
    assert all(result.isfinite().all() for result in results)
    assert (results[1] == (1.0 if extreme > 0 else 0.0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_that_is_nan_spoils_its_own_row_only(case, backend, dtype):
    inputs = case((3, 7), 20, 2, dtype=dtype)
    clean = run(inputs, backend)
    states = inputs.states.detach().clone()
    states[1, 2, 5] = torch.nan
    spoilt = run(inputs._replace(states=states.requires_grad_()), backend)
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    for index in (0, 1, 2, 3, 4):
        assert torch.equal(clean[index][others], spoilt[index][others])
    assert torch.equal(clean[5], spoilt[5])
    assert spoilt[0][1, 2].isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_a_smaller_dtype_are_taken_as_they_are(case, backend):
    inputs = case((3, 7), 8, 3)
    small = inputs.logits.detach().bfloat16().requires_grad_()
    results = run(inputs._replace(logits=small), backend)
    same = run(inputs._replace(logits=small.detach().float().requires_grad_()), backend)
    assert results[4].dtype == torch.bfloat16
    assert torch.equal(results[4], same[4].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(results[:3], same[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_baseline_in_the_states_dtype_gets_its_gradient_in_it(case, backend):
    inputs = case((3, 7), 8, 3, dtype=torch.bfloat16)
    small = inputs.baseline.detach().bfloat16().requires_grad_()
    grad = run(inputs._replace(baseline=small), backend)[5]
    wide = run(inputs._replace(baseline=small.detach().float().requires_grad_()), backend)[5]
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, wide.bfloat16())


@pytest.mark.parametrize("backend", FAST)
def test_the_baseline_gradient_of_many_rows_is_summed_in_float32(case, backend):
    inputs = case((4096,), 3, 1, dtype=torch.bfloat16)
    logits = torch.full_like(inputs.logits, -100.0).requires_grad_()
    mixed = gate_mix(inputs.states, logits, inputs.baseline, inputs.seed, backend=backend).mixed
    (grad,) = torch.autograd.grad(mixed, inputs.baseline, torch.ones_like(mixed))
    # Every gate is closed: the sum of 4096 ones is exact in float32 and stops at 256 in bfloat16.
    np.testing.assert_array_equal(grad.numpy(), np.full(3, 4096.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_inputs_are_kept_for_backward(case, backend):
    inputs = case()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gate_mix(*inputs, backend=backend)
    assert set(kept) == {t.data_ptr() for t in inputs}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stride_of_a_last_dim_of_one_does_not_matter(backend):
    # PyTorch calls such a tensor contiguous, whatever that stride
    states, grad = (torch.randn(2, 1, 5).transpose(1, 2) for _ in range(2))
    logits, seed = torch.zeros(2, 5, 3, requires_grad=True), torch.tensor([1, 2])
    results = []
    for copy in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        mixed = gate_mix(copy(states), logits, torch.zeros(1), seed, backend=backend).mixed
        results.append((mixed, *torch.autograd.grad(mixed, logits, copy(grad))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
