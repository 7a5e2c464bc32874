"""Is this installation fit? Versions, backends and why not, threads, and the operations against their oracles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffmask_fast.ops import Head, backends, gate_mix, probe_logits, probe_reference, reference
from diffmask_fast.runs import versions
from diffmask_fast.training.backbone import multiplies_bfloat16

CHECK_SECONDS = 2.0
"""Of all checks together."""

ROUNDINGS = 64
"""The float32 rounding steps of a result that are allowed; how large a result is, each operation's cases say."""

BOUND = 10.0


def report() -> bool:
    """Print what there is; True if every backend that can run agrees with the oracles."""
    for name, version in versions().items():
        print(f"{name:18} {version}")
    print(f"{'threads':18} {torch.get_num_threads()}")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    print(f"{'accelerator':18} {accelerator or 'none'}")
    dtype = "bfloat16" if multiplies_bfloat16() else "float32, knowing of no instructions for bfloat16"
    print(f"{'trains models in':18} {dtype}")
    reasons = backends.available()
    seconds = CHECK_SECONDS / sum(len(backends.BACKENDS[name].modules) for name in reasons if reasons[name] is None)
    good = True
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{'backend ' + name:18} not available: {reason}")
            continue
        for operation in backends.BACKENDS[name].modules:
            worst, cases = check(name, operation, seconds)
            fine = worst <= 1
            good &= fine
            said = f"{'ok' if fine else 'WRONG'}: {cases} cases, error {worst:.2f} of what is allowed"
            print(f"{'backend ' + name:18} {operation:12} {said}")
    return good


def check(backend: str, operation: str, seconds: float) -> tuple[float, int]:
    """Random cases for so long: the largest error against the float64 oracle, as a share of what is allowed, and how
    many cases there were."""
    device = backends.BACKENDS[backend].device or "cpu"
    if not torch.cuda.is_available():  # where Triton's kernels are interpreted
        device = "cpu"
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    worst, cases, end = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < end or cases == 0:
        for ours, oracle, size in OPERATIONS[operation](backend, device, generator):
            error = ((ours.double() - oracle).abs() / size).nan_to_num(nan=math.inf)  # max() would pass over a NaN
            worst = max(worst, error.max().item() / allowed)
        cases += 1
    return worst, cases


Compared = Iterator[tuple[Tensor, Tensor, Tensor | float]]  # a backend's result, the oracle's, and the size of both


def _gate_mix(backend: str, device: str, generator: torch.Generator) -> Compared:
    """The steepest path, logit to gate, multiplies an error of one rounding step by (right - left) / (4 * temperature)
    = 1.5 and a uniform's logit by at most 16."""
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
        yield ours, oracle, oracle.abs().clamp(min=1)


def _probe_logits(backend: str, device: str, generator: torch.Generator) -> Compared:
    """A logit is as large as its bound, which multiplies what the products' sums of up to 78 and 39 terms round off."""
    count, length, width, inner = (int(n) for n in torch.randint(1, 40, (4,), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    first, *states = (normal(2, length, width) for _ in range(1 + count))
    shapes = ((inner, 1), (inner, 2 * width), (inner,), (1, 1), (1, inner), ())
    heads = [Head(*(normal(*shape) for shape in shapes)) for _ in states]
    got = probe_logits(states, heads, first, bound=BOUND, backend=backend)
    weights = [weight.double() for head in heads for weight in head]
    exact = ([state.double() for state in states], weights, BOUND, False)
    yield got, probe_reference.probe_logits_forward(first.double(), *exact)[0], BOUND


OPERATIONS: dict[str, Callable[[str, str, torch.Generator], Compared]] = {
    "gate_mix": _gate_mix,
    "probe_logits": _probe_logits,
}
