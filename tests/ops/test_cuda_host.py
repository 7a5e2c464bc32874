"""The CUDA kernels, their launchers and the Python around them, run on the host; tests/cuda_host says how."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmask_fast.ops import cpu, cuda, reference
from diffmask_fast.ops.layout import plan

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAW = (reference.TEMPERATURE, reference.LEFT, reference.RIGHT)
# leading dims, H, K, baseline: widths with a tail and without, of more than one chunk, and each kind of baseline
SHAPES = [
    ((3, 7), 37, 4, (37,)),
    ((2, 17), 1024, 1, (1024,)),
    ((3, 7), 8, 13, (1, 7, 8)),
    ((5, 3), 129, 5, (3, 129)),
    ((3, 7), 600, 26, (3, 1, 600)),
    ((3, 4), 3, 33, (3, 4, 3)),
    ((2, 3, 5), 16, 64, (2, 1, 5, 16)),
    ((40,), 1, 70, (1,)),
    ((1, 5), 1027, 2, (1027,)),
    ((3,), 2056, 5, (2056,)),
    ((2, 2, 2, 2, 2), 8, 1, (2, 1, 2, 1, 2, 8)),
]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


def compile_host_library(library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = ["csrc/gate_mix_cuda.cu", "tests/cuda_host/library.cpp"]
    command = [
        *(COMPILER, "-x", "c++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fvisibility=hidden", f"-I{ROOT}/tests/cuda_host"),
        *(f"-isystem{path}" for path in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(str(ROOT / source) for source in sources),
        *("-o", str(library), *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory) -> ctypes.CDLL:
    path = Path(os.environ.get("CUDA_HOST_LIBRARY") or tmp_path_factory.mktemp("cuda_host") / "cuda_host.so")
    if not path.exists():
        compile_host_library(path)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


class Inputs(NamedTuple):
    states: Tensor
    logits: Tensor
    baseline: Tensor
    seed: Tensor


def make(leading=(3, 7), width=37, gates=4, baseline=None, dtype=torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # The more gates, the further open, so that their product is not always 0.
    return Inputs(
        normal(*leading, width).to(dtype),
        normal(*leading, gates) * 2 + 1 + math.log(gates),
        normal(*(baseline or (width,))),
        torch.tensor([1234567890123456789, -5]),
    )


def gradients(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixed, running, opened = (torch.randn(t.shape, generator=generator) for t in (inputs[0], inputs[1], inputs[1]))
    return mixed.to(inputs.states.dtype), running, opened


def run(backend: Any, inputs: Inputs, grads: Any = None) -> tuple[Tensor, ...]:
    """mixed, gates, log_open, and the gradients of states, logits and baseline."""
    grads = grads or gradients(inputs)
    return *backend.gate_mix_forward(*inputs, *LAW), *backend.gate_mix_backward(*grads, *inputs, *LAW, True, True)


def in_float64(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...]]:
    grads = tuple(grad.double() for grad in gradients(inputs))
    return Inputs(*(t.double() for t in inputs[:3]), inputs.seed), grads


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same precision, and a rounding or two."""
    error = (ours.double() - exact).abs().max()
    eps = torch.finfo(ours.dtype).eps
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * eps * exact.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_same(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_close_to_float64_as_the_reference_is_and_with_the_bits_of_the_cpp_backend(shape, dtype):
    assert cpu.unavailable() is None
    inputs = make(*shape, dtype=dtype)
    ours, plain, cpp = (run(backend, inputs) for backend in (cuda, reference, cpu))
    exact = run(reference, *in_float64(inputs))
    assert 0.01 < (ours[3] != 0).double().mean(), "no gate is open, so nothing is shown"
    for mine, theirs, oracle in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert_as_good(mine, theirs, oracle)
    # Dot products and the sums of a shared baseline are added in another order; nothing else is.
    assert_same(ours[:4], cpp[:4])
    layout = plan(inputs.states, inputs.baseline)
    if layout.members <= cuda.SHORTEST_PART and layout.baseline.shape == inputs.baseline.shape:
        assert_same(ours[5:], cpp[5:])
    without_dots = (None, *gradients(inputs)[1:])
    for mine, theirs in zip(
        cuda.gate_mix_backward(*without_dots, *inputs, *LAW, True, True),
        cpu.gate_mix_backward(*without_dots, *inputs, *LAW, True, True),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("order", ["down", "1", "2"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4], SHAPES[7]], ids=str)
def test_the_order_in_which_threads_run_changes_nothing(shape, order, monkeypatch):
    monkeypatch.setattr(cuda, "part_members", lambda layout: 40)  # several tiles for a block
    inputs = make(*shape, dtype=torch.bfloat16)
    first = run(cuda, inputs)
    monkeypatch.setenv("CUDA_HOST_ORDER", order)
    assert_same(run(cuda, inputs), first)


@pytest.mark.parametrize("members", [1, 7, 16, 40])
def test_any_number_of_blocks_gives_the_same_gradients_but_for_the_order_of_one_sum(members, monkeypatch):
    inputs = make((2, 50), 40, 3)
    whole = run(cuda, inputs)
    monkeypatch.setattr(cuda, "part_members", lambda layout: members)
    cut = run(cuda, inputs)
    assert_same(cut[:5], whole[:5])
    # 100 terms, none of them larger than its gradient, added in another order
    terms = gradients(inputs)[0].abs().sum((0, 1)).max().item()
    torch.testing.assert_close(cut[5], whole[5], rtol=0, atol=2 * 100 * 2**-24 * terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 8])
def test_slices_give_what_their_copies_give_whatever_they_are_aligned_to(start, dtype):
    inputs = make((3, 7, 2), 48, 2, (7, 1, 48), dtype)
    grads = gradients(inputs)
    room = torch.full((2, 8, 4, 80), torch.nan, dtype=dtype)
    sliced = []
    for tensor in (inputs.states, grads[0]):
        view = room.repeat(2, 1, 1, 1)[:3, 1:, 1:3, start : start + 48]
        view.copy_(tensor)
        sliced.append(view)
    ours = run(cuda, inputs._replace(states=sliced[0]), (sliced[1], *grads[1:]))
    copy = run(cuda, inputs, grads)
    assert_same(ours[:4] + ours[5:], copy[:4] + copy[5:])
    # A lane may have other columns: a sum of 48 products in another order, times a slope of at most 1.5.
    products = (grads[0].float() * (inputs.states.float() - inputs.baseline)).abs().sum(-1).max().item()
    torch.testing.assert_close(ours[4], copy[4], rtol=0, atol=1.5 * 2 * 48 * 2**-24 * products)


@pytest.mark.parametrize("which", ["expanded", "permuted", "scalar"])
def test_gradients_with_any_strides_give_what_their_copy_gives(which):
    inputs = make((3, 6), 16, 2)
    grad = {
        "expanded": torch.ones(1, 1, 1).expand(3, 6, 16),
        "permuted": torch.randn(16, 6, 3).permute(2, 1, 0),
        "scalar": torch.randn(3, 1, 16).expand(3, 6, 16),
    }[which]
    rest = gradients(inputs)[1:]
    assert_same(run(cuda, inputs, (grad, *rest)), run(cuda, inputs, (grad.contiguous(), *rest)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_that_is_nan_spoils_its_own_row_only(dtype):
    inputs = make((3, 7), 20, 2, dtype=dtype)
    states = inputs.states.clone()
    states[1, 2, 5] = torch.nan
    clean, spoilt = run(cuda, inputs), run(cuda, inputs._replace(states=states))
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert_same([t[others] for t in spoilt[:5]], [t[others] for t in clean[:5]])
    assert_same(spoilt[5:], clean[5:])
    assert spoilt[0][1, 2].isnan().sum() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gates", [1, 5, 70])
def test_a_logit_that_is_not_finite_makes_its_row_nan_and_no_other(gates, value):
    inputs = make((3, 7), 20, gates)
    logits = inputs.logits.clone()
    logits[1, 2, gates // 2] = value
    clean, spoilt = run(cuda, inputs), run(cuda, inputs._replace(logits=logits))
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert_same([t[others] for t in spoilt[:5]], [t[others] for t in clean[:5]])
    for spoilt_row in (spoilt[0][1, 2], spoilt[1][1, 2, gates // 2 :], spoilt[2][1, 2, gates // 2 :], spoilt[4][1, 2]):
        assert spoilt_row.isnan().all()


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_there_count_as_zero(given):
    inputs = make((3, 7), 12, 35)
    grads = tuple(grad if there else None for grad, there in zip(gradients(inputs), given, strict=True))
    zeros = tuple(full * there for full, there in zip(gradients(inputs), given, strict=True))
    assert_same(run(cuda, inputs, grads)[3:], run(cuda, inputs, zeros)[3:])


def test_gradients_that_nobody_asks_for_are_empty_and_change_nothing():
    inputs = make((2, 40), 12, 2)
    every = cuda.gate_mix_backward(*gradients(inputs), *inputs, *LAW, True, True)
    for states, baseline in ((False, True), (True, False), (False, False)):
        some = cuda.gate_mix_backward(*gradients(inputs), *inputs, *LAW, states, baseline)
        for got, full, wanted in zip(some, every, (states, True, baseline), strict=True):
            assert torch.equal(got, full) if wanted else got.numel() == 0


def test_extreme_logits_give_finite_gates_and_gradients():
    inputs = make((4, 5), 6, 1)
    for value in (-3e38, -100.0, 100.0, 3e38):
        results = run(cuda, inputs._replace(logits=torch.full_like(inputs.logits, value)))
        assert all(result.isfinite().all() for result in results)
        assert (results[1] == (1.0 if value > 0 else 0.0)).all()


@pytest.mark.parametrize("threads", [1, 32, 96, 256])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (2**40 + 3, 2**32 - 2), (-1, -2), (-(2**63), 2**63 - 1)])
def test_words_are_those_of_numpy_bit_for_bit_for_every_size_of_block(library, seed, offset, threads):
    out = np.zeros(101, dtype=np.uint32)
    library.stream_words(*map(ctypes.c_int64, (seed, offset, out.size, threads)), ctypes.c_void_p(out.ctypes.data))
    np.testing.assert_array_equal(out, numpy_words(seed, offset, out.size))


def numpy_words(seed: int, offset: int, n: int) -> np.ndarray:
    """The contract of diffmask_fast/ops/philox.py again, in Python's whole numbers."""
    words: list[int] = []
    for call in range((n + 3) // 4):
        counter = (offset + call) % 2**64
        c = (counter % 2**32, counter >> 32, 0, 0)
        k0, k1 = seed % 2**32, (seed >> 32) % 2**32
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = ((p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32)
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        words += c
    return np.array(words[:n], dtype=np.uint32)


def test_the_operators_guard_the_memory_of_those_who_call_them_directly():
    states, logits, baseline, seed = make((2, 3), 8, 5)
    layout = plan(states, baseline)
    out = [torch.empty_like(states), torch.empty_like(logits), torch.empty_like(logits)]
    forward = torch.ops.diffmask_fast.gate_mix_forward_cuda
    forward(states, logits, baseline, seed, *LAW, layout.numbers(), *out)
    for wrong in ([1] * 16, layout.numbers()[:12], [*layout.numbers()[:-2], 9, 0]):
        with pytest.raises(RuntimeError, match="layout"):
            forward(states, logits, baseline, seed, *LAW, wrong, *out)
    with pytest.raises(RuntimeError, match="baseline"):
        forward(states, logits, baseline[:4], seed, *LAW, layout.numbers(), *out)
    with pytest.raises(RuntimeError, match="seed"):
        forward(states, logits, baseline, seed.int(), *LAW, layout.numbers(), *out)
