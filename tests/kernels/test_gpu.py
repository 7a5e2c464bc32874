"""The contract of `gate_mix` on a GPU, for each backend that is made for one. The oracle: the reference in float64."""

from __future__ import annotations

import pytest
import torch

from diffmask_fast.ops import backends, cpu, gate_mix

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# leading dims, H, K, baseline
SHAPES = [
    ((8, 384), 1024, 26, (1024,)),
    ((8, 384), 768, 1, (1, 384, 768)),
    ((3, 7), 37, 4, (3, 1, 37)),
    ((3, 7), 15, 64, (3, 7, 15)),
    ((1,), 1, 1, (1,)),
    ((20_000,), 129, 5, (129,)),
    ((2, 9), 5000, 3, (9, 5000)),
]


@pytest.fixture(params=[name for name, entry in backends.BACKENDS.items() if entry.device == "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def on_gpu(inputs):
    return type(inputs)(*(t.detach().cuda().requires_grad_(t.is_floating_point()) for t in inputs))


def gradients(outputs):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def run(inputs, backend, grads=None):
    """(mixed, gates, log_open, and the gradients of states, logits and baseline)."""
    outputs = gate_mix(*inputs, backend=backend)
    grads = gradients(outputs) if grads is None else grads
    grads = [grad.to(output) for grad, output in zip(grads, outputs, strict=True)]
    return (*outputs, *torch.autograd.grad(outputs, inputs[:3], grads))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_close_to_float64_as_the_reference_is(case, shape, dtype, backend):
    inputs = on_gpu(case(*shape, dtype=dtype))
    grads = gradients(gate_mix(*inputs, backend="reference"))
    double = type(inputs)(*(t.detach().double().requires_grad_() for t in inputs[:3]), inputs.seed)
    exact, plain = run(double, "reference", grads), run(inputs, "reference", grads)
    for mine, theirs, oracle in zip(run(inputs, backend, grads), plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.device == theirs.device
        allowed = 2 * (theirs.double() - oracle).abs().max()
        allowed += 4 * torch.finfo(mine.dtype).eps * oracle.abs().max()
        assert (mine.double() - oracle).abs().max() <= allowed


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"backend cpu: {cpu.unavailable()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_have_the_bits_that_they_have_on_the_cpu(case, dtype, backend):
    inputs = case((300, 70), 8, 1, dtype=dtype)
    there = gate_mix(*on_gpu(inputs), backend=backend)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, gate_mix(*inputs, backend="cpu"), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mix_has_the_bits_of_the_formula_and_backward_the_gates_of_forward(case, dtype, backend):
    inputs = on_gpu(case((50, 40), 264, 3, dtype=dtype))
    mixed, gates, _ = gate_mix(*inputs, backend=backend)
    z = gates[..., -1:]
    assert torch.equal(mixed, (z * inputs.states.float() + (1 - z) * inputs.baseline).to(dtype))
    (grad,) = torch.autograd.grad(mixed.sum(), inputs.states)
    assert torch.equal(grad, z.to(dtype).expand_as(grad))


def test_the_same_call_gives_the_same_bits(case, backend):
    inputs = on_gpu(case((64, 200), 520, 13))
    first = run(inputs, backend)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, backend), strict=True))


@pytest.mark.parametrize("start", [0, 1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_anywhere_in_a_bigger_tensor_give_what_their_copy_gives(case, start, dtype, backend):
    big = on_gpu(case((9, 50, 4), 80, 2, dtype=dtype))
    view = big.states.detach()[1:8, 2:, 1:3, start : start + 64].transpose(0, 1)
    _, logits, baseline, _ = on_gpu(case((48, 7, 2), 64, 2))
    results = [run((t.requires_grad_(), logits, baseline, big.seed), backend) for t in (view.contiguous(), view)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_states_of_more_than_two_to_the_31_elements_are_all_reached(backend):
    rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("there are less than 24 GiB of free GPU memory")
    states = torch.ones(rows, width, dtype=torch.bfloat16, device="cuda")
    logits = torch.full((rows, 1), 100.0, device="cuda", requires_grad=True)
    baseline = torch.zeros(width, device="cuda", requires_grad=True)
    seed = torch.tensor([1, 2], device="cuda")
    mixed = gate_mix(states.requires_grad_(), logits, baseline, seed, backend=backend).mixed
    assert torch.equal(mixed[-5:], states[-5:])
    grads = torch.autograd.grad(mixed, (states, baseline), torch.ones_like(mixed))
    assert (grads[0][-5:] == 1).all() and (grads[1] == 0).all()


def test_a_logit_that_is_not_finite_spoils_its_own_row_only(case, backend):
    inputs = on_gpu(case((3, 7), 16, 4))
    clean = run(inputs, backend)
    logits = inputs.logits.detach().clone()
    logits[1, 2, 1] = torch.nan
    spoilt = run(inputs._replace(logits=logits.requires_grad_()), backend)
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean[:5], spoilt[:5], strict=True))
    assert spoilt[0][1, 2].isnan().all()


def test_compile_takes_it_whole_and_gives_the_eager_bits(case, backend):
    inputs = on_gpu(case((8, 30), 64, 5))

    def step(*inputs):
        result = gate_mix(*inputs, backend=backend)
        return (result.mixed**2).sum() + (result.gates**2).sum() + result.log_open.sum(), result.mixed

    (eager, mixed), (ours, mine) = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(mixed, mine)
    expected = torch.autograd.grad(eager, inputs[:3])
    assert all(torch.equal(a, b) for a, b in zip(expected, torch.autograd.grad(ours, inputs[:3]), strict=True))


def test_a_cuda_graph_draws_new_gates_at_each_replay(case, backend):
    inputs = on_gpu(case((8, 30), 64, 5))[:3]
    with torch.no_grad():
        gate_mix(*inputs, backend=backend)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gates = gate_mix(*inputs, backend=backend).gates
        draws = []
        for _ in range(3):
            graph.replay()
            draws.append(gates.clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
