"""What a training step takes per token, in time and memory, from short texts to long ones read in one piece.

    python bench/long.py [--model bert modernbert] [--masking input] [--lengths 384 ... 4096] [--json FILE] [--rounds N]

One text a step, random weights of a small geometry with room for 4,096 tokens. The probe looks at all sites, nothing is
remembered, so a step has all parts: a whole clean pass, gates, a whole masked pass, backward. Attention takes time that
grows with the square of the length. It is shown apart: what a step takes beyond one of the same model whose attention
hands on its values as they are. `plain` and `checkpointed` are two ways to run the same step, and before anything is
timed their losses and gradients are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import measure
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForQuestionAnswering,
    ModernBertConfig,
    ModernBertForQuestionAnswering,
)

from diffmask_fast.masking import frozen
from diffmask_fast.probes import Probe
from diffmask_fast.sites import patch
from diffmask_fast.training.backbone import checkpointed
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.recipe import Recipe

LAYERS, WIDTH, HEADS, WORDS, LONGEST = 8, 128, 2, 1000, 4096
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": LONGEST,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODELS = {
    "bert": lambda: BertForQuestionAnswering(BertConfig(**SHAPE)),
    "modernbert": lambda: ModernBertForQuestionAnswering(ModernBertConfig(**SHAPE, **SPECIAL)),
}
NO_ATTENTION = "values"
WAYS = {"plain": lambda layers: nullcontext(), "checkpointed": checkpointed}


def hand_on_values(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return value.transpose(1, 2), None


@contextmanager
def without_attention(model: Any) -> Iterator[None]:
    AttentionInterface.register(NO_ATTENTION, hand_on_values)
    AttentionMaskInterface.register(NO_ATTENTION, lambda *_, **__: None)
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation(NO_ATTENTION)
        yield
    finally:
        model.set_attn_implementation(own)


def step(objective: Objective, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """A step's loss and gradients, always of the same noise."""
    torch.manual_seed(1)
    loss = objective(**inputs)["loss"]
    return loss.detach(), *torch.autograd.grad(loss, list(objective.probe.parameters()), allow_unused=True)


def rows_of(name: str, masking: str, lengths: list[int], rounds: int) -> Iterator[dict]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with frozen(model), patch(model) as patched:
        last = len(patched.sites) - 1
        probe = Probe([WIDTH] * len(patched.sites), masking, bias=1.0)
        objective = Objective(patched, probe, Recipe()).eval()  # whose multipliers stay, from one step to the next
        objective.draw_sites = lambda count: torch.full((count,), last if masking == "input" else 0)  # type: ignore
        for length in lengths:
            ids = torch.randint(5, WORDS, (1, length), generator=torch.Generator().manual_seed(length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            run = partial(step, objective, inputs)
            refuse_if_wrong(run, patched.layers)
            whole, rest = {}, {}
            peaks: dict[str, list[int]] = {}
            for way, wrap in WAYS.items():
                for attention, times in ((nullcontext, whole), (partial(without_attention, model), rest)):
                    with wrap(patched.layers), attention():
                        peaks.setdefault(way, []).append(measure.peak_extra_bytes(run, "cpu"))
                        times |= measure.in_turn({way: run}, "cpu", rounds, warm_up=1)
            for way in WAYS:
                yield row(name, masking, length, way, whole[way], rest[way], peaks[way])


def row(
    name: str, masking: str, length: int, way: str, whole: list[float], rest: list[float], peaks: list[int]
) -> dict[str, Any]:
    """Of the seconds the least: the machine does other work too, which only adds."""
    return {
        "model": name,
        "masking": masking,
        "length": length,
        "way": way,
        "us_per_token": round(1e3 * min(whole) / length, 1),
        "us_per_token_but_attention": round(1e3 * min(rest) / length, 1),
        "bytes_per_token": round(peaks[0] / length),
        "bytes_per_token_but_attention": round(peaks[1] / length),
    }


def refuse_if_wrong(run: measure.Run, layers: list) -> None:
    """Both ways run the same products, so that all they give is equal to the last bit."""
    results = []
    for wrap in WAYS.values():
        with wrap(layers):
            results.append(run())
    for one, other in zip(*results, strict=True):
        if one is not other and not torch.equal(one, other):
            raise SystemExit("the checkpointed step gives something else: no time is printed for a wrong result")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", default=tuple(MODELS))
    parser.add_argument("--masking", choices=("input", "hidden"), nargs="+", default=("input",))
    parser.add_argument("--lengths", type=int, nargs="+", default=(384, 1024, 2048, 4096))
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    if not all(1 <= length <= LONGEST for length in options.lengths):
        raise SystemExit(f"--lengths {options.lengths}: expected 1 to {LONGEST} tokens")
    rows = []
    for name in options.model:
        for masking in options.masking:
            for found in rows_of(name, masking, options.lengths, options.rounds):
                rows.append(found | {"threads": options.threads})
                print(*(f"{value:>12}" for value in found.values()), flush=True)
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
