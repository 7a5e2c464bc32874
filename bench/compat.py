"""Time the compat gates against the published formulas in plain PyTorch.

    python bench/compat.py [--json FILE] [--threads N] [--rounds N] [--network]

At every shape of ops.py the gate networks give logits that are there already, so that drawing, mixing and the logs of
P(gate != 0) are timed, forward and backward. With --network also the whole gate at SQuAD's shape, where matrix products
that are the same for both are nearly all of the work. A row is timed only after outputs and gradients were compared on
the same uniforms.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import ops
import torch
from torch import Tensor, nn

from diffmask_fast.compat.diffmask import DiffMaskGateInput
from diffmask_fast.ops import draw_seed, uniforms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "compat"))
import plain

SQUAD = (8, 384, 1024, 26)
SEED = 7


class Given(nn.Module):
    """A gate network whose logits are there already."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()

    def forward(self, *args: Tensor) -> Tensor:
        return self.logits


def published_masking(state: Tensor, logits: Tensor, placeholder: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """As the published code: a relaxed Bernoulli distribution, an affine transform of it, a clamp, running products."""
    base = torch.distributions.RelaxedBernoulli(torch.full_like(logits, plain.TEMPERATURE), logits=logits)
    eps = torch.finfo(logits.dtype).eps
    u, probs = u.clamp(eps, 1 - eps), base.probs.clamp(eps, 1 - eps)
    s = torch.sigmoid((u.log() - (-u).log1p() + probs.log() - (-probs).log1p()) / base.temperature)
    gates = (s * 1.2 - 0.2).clamp(0, 1).cumprod(-1)
    opened = plain.log_nonzero(logits, plain.TEMPERATURE, plain.LEFT, plain.RIGHT).cumsum(-1)
    return plain.mixed(state, gates[..., -1], placeholder), gates[..., -1], opened[..., -1], gates, opened


def step(gate: nn.Module, call: Callable[[], tuple[Tensor, ...]], grad: Tensor) -> Callable[[], list[Tensor]]:
    leaves = list(gate.parameters())

    def run() -> list[Tensor]:
        new, _, opened, *_ = call()
        grads = torch.autograd.grad([new, opened], leaves, [grad, torch.ones_like(opened)], allow_unused=True)
        return [new.detach(), *(g for g in grads if g is not None)]

    return run


def in_float64(gate: Any, states: list[Tensor], theirs: Callable, u: Tensor, grad: Tensor) -> list[Tensor]:
    """The oracle: in float32 the published way takes a logit of 12 through a probability that is 1 but for a hundred
    roundings, and back."""
    gate, states = copy.deepcopy(gate).double(), [state.double() for state in states]
    return step(gate, lambda: theirs(gate, states, u.double()), grad.double())()


def row(shape: tuple[int, ...], name: str, gate: Any, states: list[Tensor], theirs: Callable, rounds: int) -> dict:
    *leading, _, count = shape
    grad = torch.randn_like(states[0])

    def seeded() -> list[Tensor]:
        torch.manual_seed(SEED)
        return step(gate, lambda: gate(states, None, count - 1), grad)()

    torch.manual_seed(SEED)
    u = uniforms(draw_seed(), count * grad[..., 0].numel()).view(*leading, count)
    oracle = in_float64(gate, states, theirs, u, grad)
    for got, want in zip(seeded(), oracle, strict=True):
        scale = max(1.0, want.abs().max().item())
        measure.refuse_if_wrong(name, got / scale, want / scale, torch.float32)
    runs = {
        "published": step(gate, lambda: theirs(gate, states, torch.rand(*leading, count)), grad),
        "compat": step(gate, lambda: gate(states, None, count - 1), grad),
    }
    times = measure.in_turn(runs, "cpu", rounds)
    found = {"shape": list(shape), "what": name, "speedup": measure.speedup(times["published"], times["compat"])}
    return found | {f"{who}_ms": measure.summary(ms)["ms"] for who, ms in times.items()}


def masking_row(shape: tuple[int, ...], rounds: int) -> dict:
    *leading, width, count = shape
    gate = DiffMaskGateInput(width, 1, count, 1, gate_fn=Given, placeholder=True)
    for layer in gate.g_hat:
        layer.logits = nn.Parameter(torch.randn(*leading, 1) + 2)
    states = [torch.randn(*leading, width)] * count

    def theirs(gate: Any, states: list[Tensor], u: Tensor) -> tuple[Tensor, ...]:
        logits = torch.cat([layer.logits for layer in gate.g_hat], -1)
        return published_masking(states[0], logits, gate.placeholder, u)

    return row(shape, "masking", gate, states, theirs, rounds)


def network_row(shape: tuple[int, ...], rounds: int) -> dict:
    """States of layer 0 as of text: 30% of the tokens in eight windows of SQuAD are distinct."""
    *leading, width, count = shape
    gate = DiffMaskGateInput(width, width // 4, count, 1, placeholder=True)
    tokens = int(0.3 * leading[0] * leading[1])
    states = [torch.randn(tokens, width)[torch.randint(tokens, leading)]]
    states += [torch.randn(*leading, width) for _ in range(count - 1)]

    def theirs(gate: Any, states: list[Tensor], u: Tensor) -> tuple[Tensor, ...]:
        columns = []
        for layer, state in zip(gate.g_hat, states, strict=True):
            inner, outer = (torch._weight_norm(f.weight_v, f.weight_g, 0) for f in (layer.f[0], layer.f[2]))
            inside = torch.tanh(nn.functional.linear(torch.cat([states[0], state], -1), inner, layer.f[0].bias))
            raw = nn.functional.linear(inside, outer, layer.f[2].bias)
            columns.append(torch.tanh(raw) * layer.max_activation + layer.bias)
        return published_masking(states[0], torch.cat(columns, -1), gate.placeholder, u)

    return row(shape, "whole gate", gate, states, theirs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", action="store_true", help="time whole gates at SQuAD's shape too")
    options = measure.options(str(__doc__), parser)
    rows = []
    for make, shapes in ((masking_row, ops.SHAPES), (network_row, [SQUAD] if options.network else [])):
        for shape in shapes:
            rows.append(make(shape, options.rounds) | {"threads": options.threads})
            print(
                "{shape!s:22} {what:10} {published_ms:9.2f} ms, compat {compat_ms:9.2f} ms {speedup:6.2f}x".format(
                    **rows[-1]
                )
            )
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
