"""What is the Triton kernels' own, run by the interpreter. What every backend promises: tests/ops/test_gate_mix.py."""

from __future__ import annotations

import interpreter
import pytest
import torch

from diffmask_fast.ops import backends, cpu, gate_mix, philox
from diffmask_fast.ops import triton as backend

triton = pytest.importorskip("triton")
tl = triton.language
if not interpreter.ON:
    pytest.skip("TRITON_INTERPRET=1 is not in the environment", allow_module_level=True)
gate_math = pytest.importorskip("diffmask_fast.kernels.gate_math")
kernels = pytest.importorskip("diffmask_fast.kernels.gate_mix")
needs_cpp = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"backend cpu: {cpu.unavailable()}")

LAWS = [(0.2, -0.2, 1.0), (2 / 3, -0.1, 1.1), (0.05, -1.0, 2.0)]
STREAMS = [(0, 0), (1, 2), (2**40 + 3, 2**32 - 2), (-1, -2), (-(2**63), 2**63 - 1)]


@triton.jit
def uniforms_kernel(seed, out, first, n, R: tl.constexpr, C: tl.constexpr):
    place = (tl.program_id(0) * R + tl.arange(0, R)[:, None]) * C + tl.arange(0, C)[None, :]
    word = gate_math.words(tl.load(seed), tl.load(seed + 1), first + place.to(tl.int64))
    tl.store(out + place, ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07, mask=place < n)


@triton.jit
def offset_kernel(index, out, steps, strides, n: tl.constexpr):
    place = tl.arange(0, n)
    tl.store(out + place, kernels._offset(tl.load(index + place), steps, strides))


@triton.jit
def scans_kernel(z, d, out, BITS: tl.constexpr):
    k = tl.arange(0, 1 << BITS)[None, :]
    row = tl.arange(0, 4)[:, None] * (1 << BITS)
    gate, grad = tl.load(z + row + k), tl.load(d + row + k)
    running = gate_math.running_product(gate, k, BITS)
    size = 4 << BITS
    tl.store(out + row + k, running)
    tl.store(out + size + row + k, gate_math.exclusive_product(running, k))
    tl.store(out + 2 * size + row + k, gate_math.running_sum(grad, k, BITS))
    tl.store(out + 3 * size + row + k, gate_math.suffix_sum(grad, k, BITS))
    tl.store(out + 4 * size + row + k, gate_math.suffix_recursion(grad, gate, k, BITS))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = type(kernels.forward_kernel).run
    monkeypatch.setattr(
        type(kernels.forward_kernel), "run", lambda self, *a, **k: names.append(self.fn.__name__) or run(self, *a, **k)
    )
    return names


def run(inputs, name="triton", law=LAWS[0], grads=None):
    """(mixed, gates, log_open, and the gradients of states, logits and baseline)."""
    law = dict(zip(("temperature", "left", "right"), law, strict=True))
    outputs = gate_mix(*inputs, backend=name, **law)
    if grads is None:
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(output.shape, generator=generator) for output in outputs]
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    return (*outputs, *torch.autograd.grad(outputs, inputs[:3], grads))


def assert_close_to_float64(inputs, results):
    """Within twice the error of plain PyTorch in the same precision, and a rounding or two."""
    double = type(inputs)(*(t.detach().double().requires_grad_() for t in inputs[:3]), inputs.seed)
    exact, plain = run(double, "reference"), run(inputs, "reference")
    for mine, theirs, oracle in zip(results, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        allowed = 2 * (theirs.double() - oracle).abs().max()
        allowed += 4 * torch.finfo(mine.dtype).eps * oracle.abs().max()
        assert (mine.double() - oracle).abs().max() <= allowed


@pytest.mark.parametrize("tile", [(1, 1024), (8, 16), (64, 1)])
@pytest.mark.parametrize(("seed", "offset"), STREAMS)
def test_uniforms_are_those_of_the_contract_bit_for_bit_whatever_the_tile(seed, offset, tile):
    stream, out = torch.tensor([seed, offset]), torch.empty(201)
    uniforms_kernel[(triton.cdiv(201, tile[0] * tile[1]),)](stream, out, 0, 201, *tile)
    assert torch.equal(out, philox.uniforms(stream, 201))


def test_an_element_beyond_32_bits_has_its_own_uniform():
    stream, out, first = torch.tensor([3, 2**32 - 7]), torch.empty(64), 2**35 + 4
    uniforms_kernel[(1,)](stream, out, first, 64, 1, 64)
    assert torch.equal(out, philox.uniforms(stream + torch.tensor([0, first // 4]), 64))


def test_rows_beyond_32_bits_are_found():
    sizes, strides = (3, 5, 2, 4), (2**40, 2**31 + 8, 7, 2**33)
    index, out = torch.arange(128, dtype=torch.int32) % 120, torch.empty(128, dtype=torch.int64)
    offset_kernel[(1,)](index, out, (40, 8, 4, 1), strides, 128)
    expected = torch.arange(120).view(sizes)
    for place in (expected == i for i in (0, 1, 57, 119)):
        digits = place.nonzero()[0].tolist()
        assert out[expected[place]].item() == sum(d * s for d, s in zip(digits, strides, strict=True))


@pytest.mark.parametrize("bits", [0, 1, 3, 6])
def test_scans_are_those_of_a_loop(bits):
    n = 1 << bits
    z, d = torch.rand(4, n), torch.randn(4, n)
    z[1, n // 2], z[2] = 0, 0
    out = torch.empty(5, 4, n)
    scans_kernel[(1,)](z, d, out, bits)
    product = z.cumprod(-1)
    suffix = d.clone()
    for k in range(n - 2, -1, -1):
        suffix[:, k] += z[:, k + 1] * suffix[:, k + 1]
    before = torch.cat([torch.ones(4, 1), product[:, :-1]], -1)
    expected = (product, before, d.cumsum(-1), d.flip(-1).cumsum(-1).flip(-1), suffix)
    for mine, loop in zip(out, expected, strict=True):
        torch.testing.assert_close(mine, loop, rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("scale", [2.0, 30.0, 1e30])
def test_one_gate_and_its_gradients_have_the_bits_of_the_cpp_backend(case, law, scale):
    states, logits, baseline, seed = case((3000,), 1, 1)
    logits = (logits.detach() * scale).requires_grad_()
    inputs = (states, logits, baseline, seed)
    grads = [torch.ones(3000, 1), torch.randn(3000, 1), torch.randn(3000, 1)]
    ours, theirs = run(inputs, "triton", law, grads), run(inputs, "cpu", law, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], theirs[:5], strict=True))


@pytest.mark.parametrize("gates", [1, 2, 3, 4, 7, 8, 26, 33, 63, 64])
def test_any_number_of_gates_is_as_close_to_float64_as_the_reference(case, gates):
    inputs = case((2, 9), 20, gates, (9, 20), torch.bfloat16)
    assert_close_to_float64(inputs, run(inputs))


@pytest.mark.parametrize("width", [1, 3, 17, 100, 1000, 1024, 1030, 2060])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_width_is_as_close_to_float64_as_the_reference(case, width, dtype):
    inputs = case((3, 5), width, 3, (width,), dtype)
    assert_close_to_float64(inputs, run(inputs))


@pytest.mark.parametrize("baseline", [(6,), (2, 1, 1, 6), (1, 3, 1, 6), (4, 6), (2, 1, 4, 6), (2, 3, 4, 6), (3, 1, 6)])
def test_any_baseline_is_as_close_to_float64_as_the_reference(case, baseline):
    inputs = case((2, 3, 4), 6, 2, baseline)
    assert_close_to_float64(inputs, run(inputs))


def test_a_baseline_that_takes_turns_over_five_dims_gets_its_gradient(case):
    inputs = case((2, 2, 2, 2, 2), 6, 2, (2, 1, 2, 1, 2, 6))
    assert_close_to_float64(inputs, run(inputs))


@pytest.mark.parametrize("parts", [1, 4, 100])
def test_the_baseline_gradient_is_summed_from_any_number_of_parts(case, parts, monkeypatch):
    monkeypatch.setattr(backend, "PROGRAMS", parts)
    monkeypatch.setattr(backend, "FEWEST_ROWS", 1)
    monkeypatch.setattr(backend, "TILE_BYTES", 256)
    inputs = case((50,), 17, 2)
    assert_close_to_float64(inputs, run(inputs))


@pytest.mark.parametrize("start", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_begin_anywhere_in_a_bigger_tensor_give_what_their_copy_gives(case, start, dtype):
    big = case((4, 6), 64, 2, dtype=dtype)
    view = big.states.detach()[1:, ::2, start : start + 32]
    logits, baseline = torch.randn(3, 3, 2, requires_grad=True), torch.randn(32, requires_grad=True)
    results = [
        run((states.requires_grad_(), logits, baseline, big.seed))
        for states in (view.clone(memory_format=torch.contiguous_format), view)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "value"), [("TILE_BYTES", 512), ("WIDEST", 16), ("GATES_OF_A_TILE", 16)])
def test_gates_and_mix_do_not_depend_on_the_tile(case, name, value, monkeypatch):
    inputs = case((2, 7), 70, 5, (7, 70))
    before = run(inputs)
    monkeypatch.setattr(backend, name, value)
    after = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True))
    for a, b in zip(before[4:], after[4:], strict=True):  # sums over rows and columns are taken in the tile's order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits(case):
    inputs = case((20, 5), 33, 7)
    assert all(torch.equal(a, b) for a, b in zip(run(inputs), run(inputs), strict=True))


def test_backward_draws_the_gates_of_forward(case):
    inputs = case((4, 9), 5, 13)
    mixed, gates, _ = gate_mix(*inputs, backend="triton")
    (grad,) = torch.autograd.grad(mixed.sum(), inputs.states)
    assert torch.equal(grad, gates[..., -1:].expand_as(grad))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_makes_its_gate_nan_and_spoils_its_own_row_only(case, value):
    inputs = case((3, 7), 10, 4)
    clean = run(inputs)
    logits = inputs.logits.detach().clone()
    logits[1, 2, 1] = value
    spoilt = run(inputs._replace(logits=logits.requires_grad_()))
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean[:5], spoilt[:5], strict=True))
    assert spoilt[0][1, 2].isnan().all()
    assert all(t[1, 2].isnan().tolist() == [False, True, True, True] for t in spoilt[1:3])


def test_forward_is_one_launch_and_backward_at_most_two(case, launches):
    inputs = case((3, 7), 10, 4)
    outputs = gate_mix(*inputs, backend="triton")
    assert launches == ["forward_kernel"]
    launches.clear()
    torch.autograd.grad(outputs.mixed.sum() + outputs.gates.sum(), inputs[:3], retain_graph=True)
    assert launches == ["backward_kernel", "finish_kernel"]
    launches.clear()
    torch.autograd.grad(outputs.log_open.sum(), inputs.logits)
    assert launches == ["finish_kernel"]


def test_too_many_gates_are_one_clear_error(case):
    with pytest.raises(ValueError, match=r"up to 1024 gates .* have 1025: use backend='reference'"):
        gate_mix(*case((2, 3), 4, 1025), backend="triton")


def test_on_a_cpu_it_runs_where_it_is_asked_for_by_name_and_never_by_itself():
    assert backends.choose("triton", "cpu", torch.float32) == "triton"
    assert backends.choose("auto", "cpu", torch.float32) != "triton"
