"""Time the attention that a frozen model has in 16 bits on a CPU against transformers' "sdpa", forward and backward.

    python bench/attention.py [--shapes 8x174x12x32 ...] [--json FILE] [--rounds N] [--threads N]

A shape is texts x tokens x heads x width of a head. Masks: none, of causal language models, of padding (texts of 80 to
100% of the tokens), and of neighbours alone, as in a sliding window. Both take turns; nothing is timed before outputs
and gradients were compared with those in float64.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffmask_fast.training.attention import LONGEST, attention

SHAPES = [(8, 100, 12, 32), (8, 174, 12, 32), (8, 343, 12, 32), (8, 343, 16, 64), (2, 1024, 12, 64)]
NEIGHBOURS = 64


def masks(texts: int, tokens: int) -> dict[str, Tensor | None]:
    numbers = torch.arange(tokens)
    lengths = torch.linspace(0.8 * tokens, tokens, texts).long()
    padding = (numbers < lengths[:, None])[:, None, None].expand(texts, 1, tokens, tokens)
    near = ((numbers[:, None] - numbers).abs() <= NEIGHBOURS).expand(texts, 1, tokens, tokens)
    return {"none": None, "causal": None, "padding": padding, "neighbours": near}


def step(attend: Any, given: list[Tensor], mask: Tensor | None, causal: bool, grad: Tensor) -> list[Tensor]:
    layer = nn.Module()
    layer.is_causal, layer.num_key_value_groups = causal, 1  # type: ignore[assignment]
    out, _ = attend(layer, *given, mask)
    return [out, *torch.autograd.grad(out, given, grad)]


def rows_of(shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    texts, tokens, heads, width = shape
    draw = partial(torch.randn, texts, tokens, heads, width, generator=torch.Generator().manual_seed(0))
    given = [draw().bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    grad = draw().bfloat16()
    rows = []
    for name, mask in masks(texts, tokens).items():
        call = partial(step, mask=mask, causal=name == "causal")
        exact = call(sdpa_attention_forward, [t.detach().double().requires_grad_() for t in given], grad=grad.double())
        for got, truth in zip(call(attention, given, grad=grad), exact, strict=True):
            measure.refuse_if_wrong("attention", got, truth, torch.bfloat16)
        contenders = {"ours": attention, "sdpa": sdpa_attention_forward}
        times = measure.in_turn({n: partial(call, f, given, grad=grad) for n, f in contenders.items()}, "cpu", rounds)
        rows.append(
            {
                "shape": list(shape),
                "mask": name,
                "ms": measure.summary(times["ours"])["ms"],
                "ms_sdpa": measure.summary(times["sdpa"])["ms"],
                "speedup": measure.speedup(times["sdpa"], times["ours"]),
            }
        )
    return rows


def shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected texts x tokens x heads x width, as in 8x174x12x32")
    return tuple(map(int, parts))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES)
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("this attention is for CPUs: leave --device out")
    if any(tokens > LONGEST for _, tokens, *_ in options.shapes):
        raise SystemExit(f"--shapes: expected up to {LONGEST} tokens; longer texts are left to sdpa")
    rows = []
    for one in options.shapes:
        for row in rows_of(one, options.rounds):
            rows.append(row | {"threads": options.threads})
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
