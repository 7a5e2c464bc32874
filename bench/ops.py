"""Time gate_mix against the published chain of distribution calls, plain PyTorch and a compiled one.

    python bench/ops.py [--json FILE] [--threads N]

A row is timed only after its result was compared with the float64 oracle on the same uniforms. All contenders of a
shape are timed in turn, round after round, so that a noisy machine is noisy for all of them alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffmask_fast.ops import draw_seed, gate_mix, reference
from diffmask_fast.ops.philox import uniforms

SHAPES = [(8, 384, 1024, 1), (8, 384, 1024, 13), (1, 384, 1024, 1), (64, 84, 768, 1), (32, 512, 1024, 13)]
ROUNDS = 15
LAW = (reference.TEMPERATURE, reference.LEFT, reference.RIGHT)


def eager(states: Tensor, logits: Tensor, baseline: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The best plain spelling: mixed state and log P(z != 0)."""
    temperature, left, right = LAW
    s = torch.sigmoid((torch.logit(u) + logits) / temperature)
    z = (left + (right - left) * s).clamp(0, 1).prod(-1, keepdim=True)
    log_open = torch.nn.functional.logsigmoid(logits - temperature * math.log(-left / right)).sum(-1)
    return torch.lerp(baseline.expand_as(states), states, z), log_open


def published(states: Tensor, logits: Tensor, baseline: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """As the paper's code does it: a relaxed Bernoulli per gate, stretched, clamped, cumulated over all layers."""
    temperature, left, right = LAW
    gates, opens = [], []
    for k in range(logits.shape[-1]):
        column = logits[..., k]
        law = torch.distributions.RelaxedBernoulli(torch.full_like(column, temperature), logits=column)
        clamped = torch.distributions.utils.clamp_probs(u[..., k])
        noise = clamped.log() - (-clamped).log1p()
        s = torch.sigmoid((noise + torch.logit(torch.distributions.utils.clamp_probs(law.probs))) / law.temperature)
        gates.append((left + (right - left) * s).clamp(0, 1))
        opens.append(torch.nn.functional.logsigmoid(column - temperature * math.log(-left / right)))
    z = torch.stack(gates, -1).cumprod(-1)[..., -1:]
    return z * states + (1 - z) * baseline, torch.stack(opens, -1).cumsum(-1)[..., -1]


def step(call: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor], grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        mixed, log_open = call()
        torch.autograd.grad([mixed, log_open], leaves, [grad, torch.ones_like(log_open)])

    return run


def measure(shape: tuple[int, int, int, int]) -> list[dict]:
    batch, length, width, count = shape
    states = torch.randn(batch, length, width)
    logits = (torch.randn(batch, length, count) + 2).requires_grad_()
    baseline = torch.randn(width).requires_grad_()
    grad = torch.randn_like(states)
    seed = draw_seed()
    u = uniforms(seed, logits.numel()).view(logits.shape)
    torch.compiler.reset()  # or the last shapes would meet the limit of recompilations and run uncompiled
    compiled = torch.compile(eager)

    def ours() -> tuple[Tensor, Tensor]:
        out = gate_mix(states, logits, baseline, seed, backend="cpu")
        return out.mixed, out.log_open[..., -1]

    def drawn(f: Callable) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: f(states, logits, baseline, torch.rand_like(logits).clamp(1e-7, 1 - 1e-7))

    oracle = reference.gate_mix_forward(states.double(), logits.double(), baseline.double(), seed, *LAW)[0]
    contenders = {"published": published, "eager": eager, "compile": compiled}
    for name, f in contenders.items():
        check(name, f(states, logits, baseline, u)[0], oracle)
    check("gate_mix", ours()[0], oracle)
    runs = {name: step(drawn(f), [logits, baseline], grad) for name, f in contenders.items()}
    runs |= {"gate_mix": step(ours, [logits, baseline], grad), "clone": states.clone}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 3:  # the first turns warm caches and compile
                times[name].append(1e3 * (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "shape": list(shape),
            "dtype": "float32",
            "pass": "forward+backward" if name != "clone" else "copy",
            "contender": name,
            "ms": round(value, 4),
            "spread_ms": round(max(times[name]) - min(times[name]), 4),
            "speedup_of_gate_mix": round(value / median["gate_mix"], 2),
        }
        for name, value in median.items()
    ]


def check(name: str, got: Tensor, oracle: Tensor) -> None:
    """Refuse to time what is wrong: 1e-3 is far below what one wrong gate does and far above rounding."""
    worst = (got.double() - oracle).abs().max().item()
    if worst > 1e-3:
        raise SystemExit(f"{name} is off by {worst:.2e}: no time is printed for a wrong result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows here too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        for row in measure(shape):
            rows.append(row | {"threads": options.threads})
            print(f"{row['shape']!s:24} {row['contender']:10} {row['ms']:9.3f} ms  x{row['speedup_of_gate_mix']}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
