"""Do several draws of gates on one clean pass pay? How alike two draws of a text are, and what a step takes.

    python bench/draws.py --folder MODEL --data TRAIN.json [--masking input hidden] [--ways 8x1 4x2 2x4] [--steps 64]
        [--trained 0.5] [--limit N] [--json FILE]

A way is texts x draws of each. A probe is trained first, by the recipe as it stands, for `--trained` epochs, so that
gates are neither all open nor settled; it stays as it is from there. `alike` is the correlation of the gradients of two
draws of one text, over as many texts as there are steps. It tells the variance of a step's gradient, `noise`, which for
n texts and d draws of each goes with (alike + (1 - alike) / d) / n; that of a single draw is 1. Then each way takes its
turn at random batches. As a training averages over steps, what counts is noise x seconds; `worth` is that of the first
way divided by that of this one: above 1 it pays. Original predictions are remembered, as in later epochs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import measure
import torch
from torch import Tensor
from transformers import AutoTokenizer

from diffmask_fast.data import Examples, encode
from diffmask_fast.masking import frozen
from diffmask_fast.models import load_for
from diffmask_fast.sites import patch
from diffmask_fast.tasks.squad import RECIPES, read_squad
from diffmask_fast.training.backbone import multiplies_bfloat16, running_in
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.remembered import remembered_for
from diffmask_fast.training.trainer import fresh_probe, train_probe


def rows_of(
    model: Any, examples: Examples, recipe: Recipe, masking: str, mask_token: int | None, ways: list[tuple[int, int]],
    steps: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each of the ways, (texts, draws of each)."""
    seconds = dict.fromkeys(ways, 0.0)
    probe = fresh_probe(model, examples, recipe, masking, mask_token=mask_token)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trained = train_probe(model, probe, examples, recipe, f"{folder}/run", bf16=multiplies_bfloat16(), quiet=True)
        stack.enter_context(frozen(model))
        stack.enter_context(running_in(model, torch.bfloat16 if multiplies_bfloat16() else None))
        patched = stack.enter_context(patch(model))
        remembered = remembered_for(patched, model, examples, folder)

        def objective(draws: int) -> Objective:
            made = Objective(patched, probe, replace(recipe, draws=draws), remembered, kind=examples.kind)
            made.multipliers.load_state_dict(trained.multipliers.state_dict())
            made.set_progress(1.0)  # of that training
            return made.eval()  # the multipliers stay as they are too

        by_length = sorted(range(len(examples)), key=examples.lengths.__getitem__)
        generator = torch.Generator().manual_seed(0)

        def batch(texts: int) -> dict[str, Tensor]:
            """Neighbours in length, as the trainer takes them."""
            first = int(torch.randint(len(by_length) - texts + 1, (), generator=generator))
            numbers = by_length[first : first + texts]
            return examples.collate([examples[i] for i in numbers]) | {"example": torch.tensor(numbers)}

        single = objective(1)
        pairs = []
        for _ in range(steps):
            one = batch(1)
            pairs.append(torch.stack([gradient(single, one), gradient(single, one)]))
        close = alike(torch.stack(pairs))
        objectives = {way: objective(way[1]) for way in ways}
        for _ in range(steps):
            for way in ways:
                given = batch(way[0])
                with torch.no_grad():
                    objectives[way](**given)  # so that their predictions are remembered, and the caches warm
                start = time.perf_counter()
                gradient(objectives[way], given)
                seconds[way] += time.perf_counter() - start
    base = noise(close, *ways[0]) * seconds[ways[0]]
    return [
        {
            "masking": masking,
            "texts": way[0],
            "draws": way[1],
            "steps": steps,
            "seconds": round(seconds[way] / steps, 4),
            "alike": round(close, 3),
            "noise": round(noise(close, *way), 4),
            "worth": round(base / (noise(close, *way) * seconds[way]), 3),
        }
        for way in ways
    ]


def gradient(objective: Objective, batch: dict[str, Tensor]) -> Tensor:
    """(P,) of all the probe's parameters, from one step."""
    parameters = list(objective.probe.parameters())
    found = torch.autograd.grad(objective(**batch)["loss"], parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def alike(pairs: Tensor) -> float:
    """(N, 2, P) gradients of two draws of N texts -> their correlation within a text, all parameters together."""
    centred = pairs.double() - pairs.double().mean((0, 1))
    return ((centred[:, 0] * centred[:, 1]).sum() / (centred.square().sum() / 2)).item()


def noise(alike: float, texts: int, draws: int) -> float:
    """The variance of a step's gradient, in variances of that of a single draw."""
    return (alike + (1 - alike) / draws) / texts


def way(text: str) -> tuple[int, int]:
    texts, _, draws = text.partition("x")
    if not (texts.isdecimal() and draws.isdecimal() and int(texts) and int(draws)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected texts x draws, as in 4x2")
    return int(texts), int(draws)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a question-answering model")
    parser.add_argument("--data", required=True, help="SQuAD JSON")
    parser.add_argument("--masking", choices=("input", "hidden"), nargs="+", default=("input", "hidden"))
    parser.add_argument("--ways", type=way, nargs="+", default=[(8, 1), (4, 2), (2, 4)])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--trained", type=float, default=0.5, help="epochs before the gradients are looked at")
    parser.add_argument("--limit", type=int, help="use only so many questions")
    options = measure.options(str(__doc__), parser)
    model: Any = load_for(options.folder, "QuestionAnswering")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    examples = encode(tokenizer, read_squad(options.data)[: options.limit], model)
    rows = []
    for masking in options.masking:
        recipe = replace(RECIPES[masking]["steady"], epochs=options.trained)
        for row in rows_of(model, examples, recipe, masking, tokenizer.mask_token_id, options.ways, options.steps):
            rows.append(row | {"threads": options.threads})
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
