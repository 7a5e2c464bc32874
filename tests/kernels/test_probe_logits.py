"""The Triton kernels of `probe_logits`: run by Triton's interpreter where TRITON_INTERPRET=1, else compiled for GPUs
that need not be there."""

from __future__ import annotations

import os

import compiled
import pytest
import torch

pytest.importorskip("triton")

from diffmask_fast.kernels import probe_logits as kernels

from diffmask_fast.ops import probe_reference, probe_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# rows, widths of the states, width of the heads, whether there is a first state, bound
CASES = [
    ((3, 7), (16, 16, 16), 16, True, 10.0),
    ((3, 7), (16, 16, 16), 16, False, None),
    ((2, 35), (12, 7), 19, True, None),
    ((2, 3), (7, 33), 150, False, 2.5),
    ((70,), (144,), 24, True, 10.0),
    ((1, 1), (1,), 2, True, None),
]


def make(leading, sizes, width, with_first, bound, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    states = [normal(*leading, size).to(dtype) for size in sizes]
    first = normal(*leading, sizes[0]).to(dtype) if with_first else None
    weights = []
    for size in sizes:
        reads = size + (sizes[0] if with_first else 0)
        weights += [normal(*s) for s in ((width, 1), (width, reads), (width,), (1, 1), (1, width), ())]
    return first, states, weights, bound


def run(backend, first, states, weights, bound, need=False):
    logits, raw, hidden = backend.probe_logits_forward(first, states, weights, bound, True)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    grads = backend.probe_logits_backward(
        grad, first, states, weights, raw, hidden, bound, need and first is not None, need
    )
    return [logits, raw, hidden, grads[0], *grads[1], *grads[2]]


def wide(first, states, weights, bound):
    return (
        None if first is None else first.double(),
        [s.double() for s in states],
        [w.double() for w in weights],
        bound,
    )


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize(
    ("case", "dtype", "need"),
    [(case, torch.float32, i % 2 == 0) for i, case in enumerate(CASES)]
    + [(CASES[0], dtype, True) for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_the_kernels_are_as_close_to_float64_as_the_reference_is(case, dtype, need):
    inputs = make(*case, dtype=dtype)
    exact = run(probe_reference, *wide(*inputs), need)
    plain, ours = run(probe_reference, *inputs, need), run(probe_triton, *inputs, need)
    assert [(mine.dtype, mine.shape) for mine in ours] == [(theirs.dtype, theirs.shape) for theirs in plain]
    for kind in {mine.dtype for mine in ours}:
        chosen = [i for i, mine in enumerate(ours) if mine.dtype == kind and mine.numel()]
        error, allowed = (
            sum(((results[i].double() - exact[i]).abs().max() / exact[i].abs().max()).item() for i in chosen)
            for results in (ours, plain)
        )
        assert error <= 2 * allowed + 4 * len(chosen) * torch.finfo(kind).eps


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
def test_strided_and_unaligned_states_give_what_their_copies_give():
    first, states, weights, bound = make((6, 10), (12, 9), 8, True, 10.0)

    def strided(tensor):
        big = torch.full((10, 6, tensor.shape[-1] + 5), torch.nan).transpose(0, 1)
        big[..., 1:-4] = tensor
        return big[..., 1:-4]

    views = strided(first), [strided(state) for state in states], weights, bound
    for mine, theirs in zip(run(probe_triton, *views), run(probe_triton, first, states, weights, bound), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize("place", ["first", "state"])
def test_a_state_that_is_nan_spoils_its_own_row_only(place):
    first, states, weights, bound = make((3, 7), (16, 16), 8, True, 10.0)
    clean = probe_triton.probe_logits_forward(first, states, weights, bound, False)[0]
    (first if place == "first" else states[1])[1, 2, 3] = torch.nan
    spoilt = probe_triton.probe_logits_forward(first, states, weights, bound, False)[0]
    assert spoilt[1, 2].isnan().tolist() == [place == "first", True]
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(clean[others], spoilt[others])


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize("with_first", [False, True])
def test_all_sites_take_two_launches_forward_and_two_backward(monkeypatch, with_first):
    launches = []
    for name in ("probe_norms", "probe_forward", "probe_backward", "probe_norms_backward"):
        kernel = getattr(kernels, name)

        class Counted:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                launches.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(kernels, name, Counted(name, kernel))
    run(probe_triton, *make((3, 7), (16,) * 5, 16, with_first, 10.0))
    assert launches == ["probe_norms", "probe_forward", "probe_backward", "probe_norms_backward"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is 1, and nothing can be compiled")
@pytest.mark.parametrize("architecture", compiled.ARCHITECTURES)
@pytest.mark.parametrize("probe", compiled.PROBE_LOGITS, ids=lambda probe: f"{probe.name}-{probe.blocks}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cubin_spills_nothing(probe, architecture, dtype):
    used = compiled.probe_logits(probe, architecture, dtype).resources
    assert (used.stack, used.local) == (0, 0)
    assert used.shared <= 99 * 1024  # what a block can have on every one of these
    assert used.threads == 32 * probe.warps
