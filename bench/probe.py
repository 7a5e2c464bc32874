"""Time probe_logits against the published loop of concatenations, plain PyTorch and a compiled one.

    python bench/probe.py [--json FILE] [--threads N] [--rounds N]

Forward and backward, float32. A case is timed only after logits and gradients were compared with the float64 oracle.
Peak memory is what a step holds at once, gradients included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import measure
import torch
from torch import Tensor

from diffmask_fast.ops import Head, probe_logits

BATCH, LENGTH, WIDTH = 8, 384, 1024
BOUND = 10.0
# Sites, masking, and how many vectors the state at the first site is made of: of the tokens in eight windows of SQuAD,
# 0.25 to 0.35 are distinct, and the output of an embedding has as many distinct rows.
CASES = {
    "input, 26 sites": (26, "input", None),
    "input, 26 sites, text": (26, "input", 920),
    "hidden, 1 site": (1, "hidden", None),
}


class Case(NamedTuple):
    states: list[Tensor]
    heads: list[Head]
    first: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [weight for head in self.heads for weight in head]


def make(name: str, width: int = WIDTH) -> Case:
    count, masking, vectors = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    states = [normal(BATCH, LENGTH, width) for _ in range(count)]
    if vectors is not None:
        states[0] = normal(vectors, width)[torch.randint(vectors, (BATCH, LENGTH), generator=generator)]
    reads, inner = width * (2 if masking == "input" else 1), width // 4
    heads = []
    for _ in range(count):
        tensors = (
            normal(inner, 1).abs(),
            normal(inner, reads) / reads**0.5,
            normal(inner) / 10,
            torch.ones(1, 1),
            normal(1, inner),
            torch.tensor(5.0),
        )
        heads.append(Head(*(tensor.requires_grad_() for tensor in tensors)))
    return Case(states, heads, states[0] if masking == "input" else None)


def published(states: list[Tensor], heads: list[Head], first: Tensor | None) -> Tensor:
    """As the paper's code does it: for each site concatenate, normalise the weights, Linear - tanh - Linear."""
    columns = []
    for state, head in zip(states, heads, strict=True):
        features = state if first is None else torch.cat([first, state], dim=-1)
        # what the hook of the old torch.nn.utils.weight_norm calls before every use
        inner = torch._weight_norm(head.direction, head.magnitude, 0)
        outer = torch._weight_norm(head.outer_direction, head.outer_magnitude, 0)
        hidden = torch.tanh(torch.nn.functional.linear(features, inner, head.bias))
        columns.append(BOUND * torch.tanh(torch.nn.functional.linear(hidden, outer)) + head.offset)
    return torch.cat(columns, dim=-1)


def eager(states: list[Tensor], heads: list[Head], first: Tensor | None) -> Tensor:
    """The best plain spelling: the weight is split, and the first state meets all left halves at once."""
    inner = [torch._weight_norm(head.direction, head.magnitude, 0) for head in heads]
    split, width = 0 if first is None else first.shape[-1], len(heads[0].bias)
    bias = torch.cat([head.bias for head in heads])
    if first is None:
        left = bias.expand(BATCH * LENGTH, -1)
    else:
        left = torch.addmm(bias, first.flatten(0, 1), torch.cat([weight[:, :split] for weight in inner]).T)
    raws = []
    for i, (state, head) in enumerate(zip(states, heads, strict=True)):
        part = left[:, i * width : (i + 1) * width]
        hidden = torch.tanh(torch.addmm(part, state.flatten(0, 1), inner[i][:, split:].T))
        raws.append(hidden @ torch._weight_norm(head.outer_direction, head.outer_magnitude, 0)[0])
    offsets = torch.stack([head.offset for head in heads])
    return (BOUND * torch.tanh(torch.stack(raws, dim=-1)) + offsets).view(BATCH, LENGTH, -1)


def ours(states: list[Tensor], heads: list[Head], first: Tensor | None) -> Tensor:
    return probe_logits(states, heads, first, bound=BOUND, backend="cpu")


def contenders() -> dict[str, Callable[..., Tensor]]:
    torch.compiler.reset()
    return {"published": published, "eager": eager, "compile": torch.compile(eager), "probe_logits": ours}


def step(f: Callable[..., Tensor], case: Case, grad: Tensor) -> list[Tensor]:
    logits = f(*case)
    return [logits, *torch.autograd.grad(logits, case.leaves(), grad)]


def check(calls: dict[str, Callable[..., Tensor]], case: Case, grad: Tensor) -> None:
    """Refuse to time what is wrong: 1e-3 of a tensor's largest value is far above rounding, also in a gradient that is
    one number, a sum of millions that nearly cancel."""
    wide = Case(
        [state.double() for state in case.states],
        [Head(*(weight.detach().double().requires_grad_() for weight in head)) for head in case.heads],
        None if case.first is None else case.first.double(),
    )
    exact = step(lambda *inputs: probe_logits(*inputs, bound=BOUND, backend="reference"), wide, grad.double())
    for name, f in calls.items():
        for got, oracle in zip(step(f, case, grad), exact, strict=True):
            worst = ((got.double() - oracle).abs().max() / oracle.abs().max()).item()
            if not worst <= 1e-3:
                raise SystemExit(f"{name} is off by {worst:.2e}: no time is printed for a wrong result")


def rows_of(name: str, device: str, rounds: int) -> list[dict]:
    case, calls = make(name), contenders()
    grad = torch.randn(BATCH, LENGTH, len(case.states), generator=torch.Generator().manual_seed(1))
    check(calls, case, grad)
    # a product like those that the work consists of, whose rate is the limit of all contenders
    a, b = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(WIDTH, 4 * WIDTH)
    out = torch.empty(len(a), b.shape[1])
    runs: dict[str, measure.Run] = {contender: partial(step, f, case, grad) for contender, f in calls.items()}
    times = measure.in_turn(runs | {"product": lambda: torch.mm(a, b, out=out)}, device, rounds)
    # forward and the weights' gradients: the frozen model's states need none
    flops = 4 * BATCH * LENGTH * sum(head.direction.numel() for head in case.heads)
    limit = statistics.median(times["product"]) * flops / (2 * a.numel() * b.shape[1])
    given = [*case.states, *case.leaves()]
    return [
        {
            "case": name,
            "dtype": "float32",
            "pass": "forward+backward",
            "contender": contender,
            **measure.summary(times[contender]),
            "speedup_of_probe_logits": measure.speedup(times[contender], times["probe_logits"]),
            "gflop": round(1e-9 * flops, 1),
            "limit_ms": round(limit, 2),
            "bytes_kept": measure.bytes_kept(run, given),
            "peak_extra_bytes": measure.peak_extra_bytes(run, device),
        }
        for contender, run in runs.items()
    ]


def main() -> None:
    options = measure.options(str(__doc__))
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    rows = []
    for name in CASES:
        for row in rows_of(name, options.device, options.rounds):
            rows.append(row | {"threads": options.threads})
            print(
                f"{name:22} {row['contender']:13} {row['ms']:9.1f} ms ({row['spread_ms']:6.1f})  "
                f"x{row['speedup_of_probe_logits']:.2f}  limit {row['limit_ms']:7.1f} ms  "
                f"kept {row['bytes_kept'] / 1e6:6.1f} MB  peak {row['peak_extra_bytes'] / 1e6:7.1f} MB",
                flush=True,
            )
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
