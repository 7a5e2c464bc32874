"""What `probe_logits` promises, for each backend; the oracle is the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

from diffmask_fast.ops import Head, probe_cpu, probe_logits
from diffmask_fast.ops.probe_reference import head_logits, heads_of

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# leading dims, widths of the states, width of the heads, whether there is a first state, bound
CASES = [
    ((3, 7), (12, 12, 12), 8, True, 10.0),
    ((3, 7), (12, 12, 12), 8, False, None),
    ((2, 5), (12, 7, 33), 19, True, None),
    ((2, 5), (12, 7, 33), 19, False, 2.5),
    ((4, 50), (96,), 24, True, 10.0),
    ((150,), (40,), 64, False, None),
    ((1, 1), (1,), 2, True, 10.0),
    ((2, 3, 4), (16, 16), 4, True, 3.0),
]


class Inputs(NamedTuple):
    states: list[Tensor]
    heads: list[Head]
    first: Tensor | None
    bound: float | None

    def leaves(self) -> list[Tensor]:
        weights = [weight for head in self.heads for weight in head]
        return weights + self.states + ([] if self.first is None else [self.first])


def make(leading, sizes, width, with_first, bound, dtype=torch.float32, weights=torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    first = normal(*leading, sizes[0], dtype=dtype) if with_first else None
    states = [normal(*leading, size, dtype=dtype) for size in sizes]
    heads = []
    for size in sizes:
        reads = size + (sizes[0] if with_first else 0)
        shapes = ((width, 1), (width, reads), (width,), (1, 1), (1, width), ())
        heads.append(Head(*(normal(*shape, dtype=weights) for shape in shapes)))
    return Inputs(states, heads, first, bound)


def in_float64(inputs: Inputs) -> Inputs:
    def wide(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    heads = [Head(*map(wide, head)) for head in inputs.heads]
    return Inputs([wide(state) for state in inputs.states], heads, wide(inputs.first), inputs.bound)


def call(inputs: Inputs, backend: str) -> Tensor:
    return probe_logits(inputs.states, inputs.heads, inputs.first, bound=inputs.bound, backend=backend)


def run(inputs: Inputs, backend: str, grad: Tensor | None = None) -> list[Tensor]:
    """The logits and the gradients of all leaves."""
    logits = call(inputs, backend)
    if grad is None:
        grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    return [logits, *torch.autograd.grad(logits, inputs.leaves(), grad.to(logits.dtype))]


def assert_as_good_as_reference(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The worst error of a tensor against float64, relative to its largest value, is on an average of the tensors at
    most twice that of plain PyTorch in the same precision, and a rounding or two."""
    for dtype in {mine.dtype for mine in ours}:
        chosen = [i for i, mine in enumerate(ours) if mine.dtype == dtype]
        error, allowed = (
            sum(((results[i].double() - exact[i]).abs().max() / exact[i].abs().max()).item() for i in chosen)
            for results in (ours, plain)
        )
        assert error <= 2 * allowed + 4 * len(chosen) * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_is_as_close_to_float64_as_the_reference_is(shape, dtype):
    inputs = make(*shape, dtype=dtype)
    exact, plain, ours = run(in_float64(inputs), "reference"), run(inputs, "reference"), run(inputs, "cpu")
    assert [(mine.dtype, mine.shape) for mine in ours] == [(theirs.dtype, theirs.shape) for theirs in plain]
    assert_as_good_as_reference(ours, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_head_is_that_of_pytorchs_own_modules(backend):
    inputs = make((3, 7), (12, 9), 8, True, 10.0)
    logits = call(inputs, backend)
    for i, head in enumerate(inputs.heads):
        inner, outer = weight_norm(torch.nn.Linear(head[1].shape[1], 8)), weight_norm(torch.nn.Linear(8, 1, bias=False))
        with torch.no_grad():
            names = (inner.parametrizations.weight, outer.parametrizations.weight)
            for weights, (magnitude, direction) in zip(names, (head[0:2], head[3:5]), strict=True):
                weights.original0.copy_(magnitude)
                weights.original1.copy_(direction)
            inner.bias.copy_(head.bias)
        features = torch.cat([inputs.first, inputs.states[i]], -1)
        expected = 10 * torch.tanh(outer(torch.tanh(inner(features))).squeeze(-1)) + head.offset
        # a bound of 10 times a handful of roundings
        torch.testing.assert_close(logits[..., i], expected, rtol=0, atol=100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("with_first", [False, True])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_the_reference_has_the_gradients_of_finite_differences(with_first, bound):
    inputs = in_float64(make((2, 3), (4, 3), 5, with_first, bound))

    def logits(*leaves):
        heads = heads_of(leaves[:12])
        states, first = list(leaves[12:14]), leaves[14] if with_first else None
        return probe_logits(states, heads, first, bound=bound, backend="reference")

    assert torch.autograd.gradcheck(logits, inputs.leaves())


def test_a_head_written_plainly_is_what_the_reference_computes():
    inputs = in_float64(make((2, 3), (4, 3), 5, True, 2.0))
    for i, head in enumerate(inputs.heads):
        features = torch.cat([inputs.first, inputs.states[i]], -1).flatten(0, 1)
        assert torch.equal(call(inputs, "reference")[..., i].flatten(), head_logits(features, head, 2.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_the_first_state_that_are_alike_change_no_result(dtype, rows):
    # as at the output of an embedding, where a token has one vector wherever it stands
    inputs = make((4, 50), (12, 9), 24, True, 10.0, dtype=dtype)
    table = inputs.first.detach().flatten(0, 1)[:rows]
    first = table[torch.arange(200) * 7 % rows].view(4, 50, 12).requires_grad_()
    inputs = inputs._replace(first=first)
    exact, plain, ours = run(in_float64(inputs), "reference"), run(inputs, "reference"), run(inputs, "cpu")
    assert_as_good_as_reference(ours, plain, exact)


@pytest.mark.parametrize("alike", [False, True])
def test_chunks_of_rows_add_up(monkeypatch, alike):
    inputs = make((3, 50), (12, 9), 8, True, 10.0)
    if alike:
        inputs = inputs._replace(first=inputs.first.detach()[:, :1].expand(3, 50, 12).clone().requires_grad_())
    exact, plain = run(in_float64(inputs), "reference"), run(inputs, "reference")
    monkeypatch.setattr(probe_cpu, "CHUNK_ROWS", 64)
    with torch.no_grad():
        no_gradient = call(inputs, "cpu")
    ours = run(inputs, "cpu")
    torch.testing.assert_close(no_gradient, ours[0])
    assert_as_good_as_reference(ours, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_states_give_what_their_copies_give(backend):
    inputs = make((3, 7), (12, 9), 8, True, 10.0)

    def strided(tensor):
        wide = torch.full((7, 3, 2 * tensor.shape[-1] + 3), torch.nan).transpose(0, 1)
        view = wide[..., 1 : 2 * tensor.shape[-1] : 2]
        view.copy_(tensor)
        return view.requires_grad_()

    views = inputs._replace(
        states=[strided(state.detach()) for state in inputs.states],
        first=strided(inputs.first.detach()),
        heads=[
            head._replace(direction=head.direction.detach().T.contiguous().T.requires_grad_()) for head in inputs.heads
        ],
    )
    for mine, theirs in zip(run(views, backend), run(inputs, backend), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("alike", [False, True])
def test_the_epilogue_gives_the_same_bits_for_one_and_two_threads(alike):
    generator = torch.Generator().manual_seed(0)
    product, left = torch.randn(300, 37, generator=generator), torch.randn(9, 37, generator=generator)
    index = torch.arange(300) % 9
    scale, bias, outer = torch.randn(3, 37, generator=generator)
    ops, results, before = torch.ops.diffmask_fast, [], torch.get_num_threads()
    assert probe_cpu.unavailable() is None
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hidden, raw, logits = product.clone(), torch.empty(300), torch.empty(300, 2)
            shared = (left, index) if alike else (None, None)
            ops.probe_epilogue_cpu(hidden, *shared, scale, bias, outer, torch.tensor(5.0), 10.0, raw, logits[:, 1])
            inside, sums, gathered = torch.empty(300, 37), torch.zeros(2, 37), torch.zeros(9, 37)
            ops.probe_epilogue_backward_cpu(raw, hidden, outer, inside, sums)
            ops.probe_scatter_add_cpu(inside, index, gathered)
            results.append((hidden, raw, logits[:, 1], inside, sums, gathered))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["first", "states"])
def test_a_state_that_is_nan_spoils_its_own_row_only(backend, place):
    inputs = make((3, 7), (12, 12), 8, True, 10.0)
    clean = call(inputs, backend)
    with torch.no_grad():
        (inputs.first if place == "first" else inputs.states[1])[1, 2, 3] = torch.nan
    spoilt = call(inputs, backend)
    assert spoilt[1, 2].isnan().tolist() == [place == "first", True]
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(clean[others], spoilt[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_states_saturate_and_give_finite_gradients(backend, size):
    inputs = make((3, 7), (12,), 8, False, 10.0)
    inputs = inputs._replace(states=[(size * inputs.states[0].detach()).requires_grad_()])
    assert all(result.isfinite().all() for result in run(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_made_only_for_what_requires_them(backend):
    every = run(make(*CASES[0]), backend)[1:]
    for wanted in range(len(every)):
        inputs = make(*CASES[0])
        for i, leaf in enumerate(inputs.leaves()):
            leaf.requires_grad_(i == wanted)
        logits = call(inputs, backend)
        logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)))
        assert [leaf.grad is not None for leaf in inputs.leaves()] == [i == wanted for i in range(len(every))]
        torch.testing.assert_close(inputs.leaves()[wanted].grad, every[wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_nothing_is_kept(backend):
    inputs = make(*CASES[0])
    with torch.no_grad():
        expected = call(inputs, backend)
        op = torch.ops.diffmask_fast.probe_logits.default
        weights = [weight for head in inputs.heads for weight in head]
        assert op(inputs.first, inputs.states, weights, 10.0, False, backend)[2].numel() == 0
    torch.testing.assert_close(expected, call(inputs, backend).detach())


def test_weights_of_a_smaller_dtype_are_computed_with_in_float32():
    inputs = make(*CASES[0], weights=torch.bfloat16)
    results = run(inputs, "cpu")
    wide = [Head(*(weight.detach().float().requires_grad_() for weight in head)) for head in inputs.heads]
    same = run(inputs._replace(heads=wide), "cpu")
    assert torch.equal(results[0], same[0])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(results[1:], same[1:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_first", [False, True])
def test_pytorch_finds_nothing_wrong_with_the_operators(backend, with_first):
    inputs = make((2, 3), (5, 4), 6, with_first, 10.0)
    weights = [weight for head in inputs.heads for weight in head]
    forward = torch.ops.diffmask_fast.probe_logits.default
    torch.library.opcheck(forward, (inputs.first, inputs.states, weights, 10.0, True, backend))
    plain = [[t.detach() for t in tensors] for tensors in (inputs.states, weights)]
    first = inputs.first.detach() if with_first else None
    _, raw, hidden = forward(first, *plain, 10.0, True, backend)
    for needed in (False, True):
        arguments = (torch.ones(2, 3, 2), first, *plain, raw, hidden, 10.0, needed and with_first, needed, backend)
        torch.library.opcheck(torch.ops.diffmask_fast.probe_logits_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_takes_it_whole_and_gives_the_eager_bits(dynamic):
    inputs = make(*CASES[0])

    def step(*leaves):
        heads, states, first = heads_of(leaves[:18]), list(leaves[18:21]), leaves[21]
        return probe_logits(states, heads, first, bound=10.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, ours = step(*inputs.leaves()), compiled(*inputs.leaves())
    assert torch.equal(eager, ours)
    grads = [torch.autograd.grad((result**2).sum(), inputs.leaves()) for result in (eager, ours)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_leaves_dtypes_and_bits_alone():
    inputs = make(*CASES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(inputs, "auto"), call(inputs, "cpu"))
    assert torch.equal(call(inputs, "auto"), call(inputs, "cpu"))


def test_a_second_derivative_is_a_clear_error():
    inputs = make(*CASES[0])
    (grad,) = torch.autograd.grad(call(inputs, "cpu").sum(), inputs.heads[0].bias, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def wrong(**change):
    inputs = make((2, 3), (5, 4), 6, True, 10.0)._asdict()
    for name, value in change.items():
        inputs[name] = value(inputs[name]) if callable(value) else value
    return Inputs(**inputs)


WRONG = [
    ({"states": lambda s: s[:1]}, ValueError, "1 states and 2 heads"),
    ({"states": [], "heads": []}, ValueError, "at least one"),
    ({"states": lambda s: [s[0], 3]}, TypeError, r"states\[1\] is a int"),
    ({"states": lambda s: [s[0], s[1][:1]]}, ValueError, r"differ in the last dim alone"),
    ({"states": lambda s: [s[0], s[1].bfloat16()]}, TypeError, "all of one dtype"),
    ({"states": lambda s: [s[0], s[1].to("meta")]}, ValueError, r"states\[1\] is on meta"),
    ({"states": lambda s: [s[1], s[0]]}, ValueError, r"heads\[0\].direction has shape \(6, 10\), expected \(6, 9\)"),
    ({"states": lambda s: [t[:0] for t in s], "first": lambda f: f[:0]}, ValueError, "leave empty batches out"),
    ({"states": lambda s: [t[0, 0] for t in s], "first": None}, ValueError, "at least one dim before H"),
    ({"first": lambda f: f[:1]}, ValueError, "first has shape"),
    ({"first": None}, ValueError, r"heads\[0\].direction has shape \(6, 10\), expected \(6, 5\)"),
    ({"first": lambda f: f.double()}, TypeError, "first is torch.float64"),
    ({"bound": 0.0}, ValueError, "bound is 0.0"),
    ({"bound": float("nan")}, ValueError, "bound is nan"),
    ({"bound": "ten"}, ValueError, "bound is ten"),
    ({"heads": lambda h: [h[0], h[1]._replace(bias=h[1].bias[:2])]}, ValueError, r"heads\[1\].bias has shape \(2,\)"),
    ({"heads": lambda h: [h[0], h[1]._replace(bias=h[1].bias.double())]}, TypeError, "one floating dtype"),
    ({"heads": lambda h: [h[0], torch.nn.Linear(5, 6)]}, TypeError, r"heads\[1\] is a Linear, expected a Head"),
    ({"heads": lambda h: [Head(*(w.double() for w in head)) for head in h]}, TypeError, "float64 and smaller"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_clear_error(change, error, words):
    with pytest.raises(error, match=words):
        call(wrong(**change), "auto")


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'gpu' is not a backend of probe_logits, expected auto, reference or cpu or triton"
    ):
        call(make(*CASES[0]), "gpu")


def test_a_backend_that_the_states_do_not_suit_says_why():
    with pytest.raises(RuntimeError, match="it takes states on cuda, and these are on cpu"):
        call(make(*CASES[0]), "triton")


def test_the_cpp_operators_guard_the_memory_of_those_who_call_them_directly():
    assert probe_cpu.unavailable() is None
    with pytest.raises(RuntimeError, match="index is out of range"):
        torch.ops.diffmask_fast.probe_scatter_add_cpu(torch.zeros(2, 3), torch.tensor([0, 5]), torch.zeros(2, 3))
