"""Is this installation fit? Versions, backends and why not, threads, and the op against its oracle."""

from __future__ import annotations

import math
import time

import torch

from diffmask_fast.ops import backends, gate_mix, reference
from diffmask_fast.runs import versions

CHECK_SECONDS = 2.0


def report() -> bool:
    """Print what there is; True if every backend that can run agrees with the oracle."""
    for name, version in versions().items():
        print(f"{name:18} {version}")
    print(f"{'threads':18} {torch.get_num_threads()}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(f"{'accelerator':18} {accelerator or 'none'}")
    good = True
    for name, reason in backends.available().items():
        if reason is not None:
            print(f"{'backend ' + name:18} not available: {reason}")
            continue
        worst, cases = check(name)
        fine = worst <= 1
        good &= fine
        print(
            f"{'backend ' + name:18} {'ok' if fine else 'WRONG'}: {cases} cases, error {worst:.2f} of what is allowed"
        )
    return good


def check(backend: str) -> tuple[float, int]:
    """Random cases for two seconds: the largest error against the float64 oracle, as a share of what is allowed.

    Allowed: 64 float32 rounding steps of a result of size 1. The steepest path, logit to gate, multiplies an error of
    one step by (right - left) / (4 * temperature) = 1.5 and a uniform's logit by at most 16.
    """
    device = backends.BACKENDS[backend].device or "cpu"
    allowed = 64 * torch.finfo(torch.float32).eps
    device = backends.BACKENDS[backend].device or "cpu"
    if not torch.cuda.is_available():  # where Triton's kernels are interpreted
        device = "cpu"
    generator = torch.Generator().manual_seed(0)
    worst, cases, end = 0.0, 0, time.monotonic() + CHECK_SECONDS
    while time.monotonic() < end or cases == 0:
        batch, length, width, gates = (int(n) for n in torch.randint(1, 40, (4,), generator=generator))
        states = torch.randn(batch, length, width, generator=generator)
        logits = torch.randn(batch, length, gates, generator=generator) * 3
        baseline = torch.randn(width, generator=generator)
        seed = torch.randint(2**62, (2,), generator=generator)
        states, logits, baseline, seed = (tensor.to(device) for tensor in (states, logits, baseline, seed))
        got = gate_mix(states, logits, baseline, seed, backend=backend)
        law = (reference.TEMPERATURE, reference.LEFT, reference.RIGHT)
        expected = reference.gate_mix_forward(states.double(), logits.double(), baseline.double(), seed, *law)
        for ours, oracle in zip(got, expected, strict=True):
            scale = oracle.abs().clamp(min=1)
            error = ((ours.double() - oracle).abs() / scale).nan_to_num(nan=math.inf)  # max() would pass over a NaN
            worst = max(worst, error.max().item() / allowed)
        cases += 1
    return worst, cases
