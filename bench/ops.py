"""Time gate_mix against the published chain of distribution calls, plain PyTorch and a compiled one.

    python bench/ops.py [--json FILE] [--threads N] [--rounds N] [--device cuda]

A row is timed only after its result was compared with the float64 oracle on the same uniforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import torch
from published import gates
from torch import Tensor

from diffmask_fast.ops import draw_seed, gate_mix, reference
from diffmask_fast.ops.backends import BACKENDS, available
from diffmask_fast.ops.philox import uniforms

# batch, length, width, gates
SHAPES = [
    (8, 384, 1024, 1),
    (8, 384, 1024, 13),
    (8, 384, 1024, 26),
    (32, 512, 1024, 13),
    (32, 512, 1024, 26),
    (1, 384, 1024, 1),
    (1, 8192, 768, 14),
    (64, 84, 768, 1),
]
PLAIN = ("published", "eager", "compile")
DTYPES = (torch.float32, torch.bfloat16)
LAW = (reference.TEMPERATURE, reference.LEFT, reference.RIGHT)
TINY = (1, 1, 16, 1)  # so small that a call's time is the host's share of it
Function = Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]


class Case(NamedTuple):
    states: Tensor
    logits: Tensor
    baseline: Tensor
    grad: Tensor
    seed: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.logits, self.baseline]


def eager(states: Tensor, logits: Tensor, baseline: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The best plain spelling: mixed state and log P(z != 0)."""
    temperature, left, right = LAW
    s = torch.sigmoid((torch.logit(u) + logits) / temperature)
    z = (left + (right - left) * s).clamp(0, 1).prod(-1, keepdim=True)
    log_open = torch.nn.functional.logsigmoid(logits - temperature * math.log(-left / right)).sum(-1)
    return torch.lerp(baseline.expand_as(states), states.float(), z).to(states.dtype), log_open


def published(states: Tensor, logits: Tensor, baseline: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper's code does it."""
    products, opens = gates(logits, u)
    z = products[..., -1:]
    return (z * states + (1 - z) * baseline).to(states.dtype), opens.cumsum(-1)[..., -1]


def ours(backend: str) -> Function:
    def call(states: Tensor, logits: Tensor, baseline: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        out = gate_mix(states, logits, baseline, seed, backend=backend)
        return out.mixed, out.log_open[..., -1]

    return call


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    *leading, width, count = shape
    states = torch.randn(*leading, width, device=device).to(dtype)
    logits = (torch.randn(*leading, count, device=device) + 2).requires_grad_()
    return Case(
        states, logits, torch.randn(width, device=device).requires_grad_(), torch.randn_like(states), draw_seed()
    )


def in_float64(case: Case) -> Case:
    """With the same seed, so that `ours("reference")` is the oracle of the case."""
    states, logits, baseline, grad = (tensor.detach().double() for tensor in case[:-1])
    return Case(states, logits.requires_grad_(), baseline.requires_grad_(), grad, case.seed)


def forward(f: Function, case: Case, noise: Callable[[], Any]) -> measure.Run:
    def run() -> Any:
        with torch.no_grad():
            return f(case.states, case.logits, case.baseline, noise())

    return run


def step(f: Function, case: Case, noise: Callable[[], Any]) -> measure.Run:
    def run() -> Any:
        mixed, log_open = f(case.states, case.logits, case.baseline, noise())
        return mixed, *torch.autograd.grad([mixed, log_open], case.leaves(), [case.grad, torch.ones_like(log_open)])

    return run


def useful_bytes(case: Case, backward: bool) -> int:
    """Each input read once, each output written once; the baseline and its gradient are too small to count."""
    states, rows = case.states.nbytes, 4 * case.logits.numel()
    bytes_ = 2 * states + 3 * rows
    return bytes_ + 2 * states + 3 * rows if backward else bytes_


def contenders(case: Case, device: str) -> tuple[dict[str, Function], list[str]]:
    """All that take part, and which of them are ours."""
    torch.compiler.reset()  # or the last shapes would meet the limit of recompilations and run uncompiled
    reasons = available()
    mine = [name for name, backend in BACKENDS.items() if backend.device == device and reasons[name] is None]
    plain: dict[str, Function] = {"published": published, "eager": eager, "compile": torch.compile(eager)}
    return plain | {name: ours(name) for name in mine}, mine


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int, host: dict[str, float]) -> list[dict]:
    case = make(shape, dtype, device)
    seed = case.seed.to(device)
    functions, mine = contenders(case, device)
    u = uniforms(seed, case.logits.numel()).view(case.logits.shape)
    oracle = forward(ours("reference"), in_float64(case), lambda: seed)()[0]
    for name, f in functions.items():
        got = f(case.states, case.logits, case.baseline, seed if name in mine else u)[0]
        measure.refuse_if_wrong(name, got.detach(), oracle, dtype)
    del oracle
    noises: dict[str, Callable[[], Any]] = {
        name: (lambda: seed) if name in mine else (lambda: torch.rand_like(case.logits).clamp(1e-7, 1 - 1e-7))
        for name in functions
    }
    rows = []
    for pass_, wrap in (("forward", forward), ("forward+backward", step)):
        runs = {name: wrap(f, case, noises[name]) for name, f in functions.items()}
        times = measure.in_turn({**runs, "clone": case.states.clone}, device, rounds)
        bytes_ = useful_bytes(case, pass_ != "forward")
        copied = [2 * case.states.nbytes / ms for ms in times["clone"]]
        for name, run in runs.items():
            fraction = measure.speedup([bytes_ / ms for ms in times[name]], copied)
            row = {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "backend": name,
                "pass": pass_,
                **measure.summary(times[name]),
                "useful_bytes": bytes_,
                "exceeds_cache": 2 * case.states.nbytes > measure.last_level_cache(),
                "copy_bandwidth_fraction": fraction,
                "peak_extra_bytes": measure.peak_extra_bytes(run, device),
                "bytes_kept": measure.bytes_kept(run, list(case)),
                "host_us": host.get(f"{name} {pass_}"),
            }
            if name in mine:
                row |= {f"speedup_vs_{other}": measure.speedup(times[other], times[name]) for other in PLAIN}
            rows.append(row)
    return rows


def host_microseconds(device: str, rounds: int) -> dict[str, float]:
    """What a call costs before any row is worked on, by contender and pass."""
    case = make(TINY, torch.float32, device)
    seed = case.seed.to(device)
    functions, mine = contenders(case, device)
    found = {}
    for pass_, wrap in (("forward", forward), ("forward+backward", step)):
        runs = {
            name: wrap(f, case, (lambda: seed) if name in mine else (lambda: torch.rand_like(case.logits)))
            for name, f in functions.items()
        }
        times = measure.in_turn(runs, device, 10 * rounds)
        found |= {f"{name} {pass_}": round(1e3 * measure.summary(ms)["ms"], 1) for name, ms in times.items()}
    return found


def main() -> None:
    options = measure.options(str(__doc__))
    host = host_microseconds(options.device, options.rounds)
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            for row in rows_of(shape, dtype, options.device, options.rounds, host):
                rows.append(row | {"threads": options.threads})
                gains = " ".join(f"{row[key]:6.2f}x" for key in row if key.startswith("speedup_vs_"))
                print(
                    f"{row['shape']!s:20} {row['dtype']:9} {row['pass']:17} {row['backend']:10} {row['ms']:9.3f} ms  "
                    f"{row['copy_bandwidth_fraction']:5.2f} of copy {row['peak_extra_bytes'] / 1e6:8.1f} MB  {gains}",
                    flush=True,
                )
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
