r"""Whether something got slower: both operations at small shapes, in less than a minute.

    python -m pytest bench/test_quick.py --benchmark-storage=runs/quick --benchmark-save=before
    python -m pytest bench/test_quick.py --benchmark-storage=runs/quick --benchmark-compare \
        --benchmark-compare-fail=median:20%

What is wrong is not timed: each result, gradients too, is compared with the float64 oracle first.
"""

from __future__ import annotations

import measure
import ops
import probe
import pytest
import torch

PASSES = {"forward": ops.forward, "forward+backward": ops.step}
SHAPES = [(1, 384, 1024, 1), (4, 128, 384, 8)]
PROBE_WIDTH = 128

pytestmark = pytest.mark.benchmark(max_time=0.5, warmup=True, warmup_iterations=measure.WARM_UP)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_mix(benchmark, shape, dtype, pass_, backend):
    torch.manual_seed(0)
    case, wrap = ops.make(shape, dtype, "cpu"), PASSES[pass_]
    run = wrap(ops.ours(backend), case, lambda: case.seed)
    oracle = wrap(ops.ours("reference"), ops.in_float64(case), lambda: case.seed)()
    for got, exact in zip(run(), oracle, strict=True):
        measure.refuse_if_wrong(backend, got, exact, dtype)
    benchmark(run)


@pytest.mark.parametrize("name", probe.CASES)
def test_probe_logits(benchmark, name):
    case = probe.make(name, PROBE_WIDTH)
    grad = torch.randn(probe.BATCH, probe.LENGTH, len(case.states), generator=torch.Generator().manual_seed(1))
    probe.check({"cpu": probe.ours}, case, grad)
    benchmark(probe.step, probe.ours, case, grad)
