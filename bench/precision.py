"""Does a probe that was trained on a bfloat16 model say something else than one that was trained on a float32 one?

    python bench/precision.py --folder MODEL --data TRAIN.json --dev DEV.json [--seeds 0 1] [--epochs 2] [--limit N]
        [--masking input] [--json FILE]

For each seed a probe is trained in both precisions, with the same draws. All are measured on the same questions of
DEV, in float32: what they keep, the divergence, and how alike their P(keep) is, of two precisions with one seed and of
two seeds with one precision. The second is the measure of the first: another seed is no worse a probe.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import measure
import torch
from transformers import AutoTokenizer

from diffmask_fast import Attributions, Examples, encode, explain, fresh_probe, train_probe
from diffmask_fast.analysis.agreement import agreement
from diffmask_fast.models import load_for
from diffmask_fast.tasks.squad import RECIPES, read_squad
from diffmask_fast.training.evaluation import attribution_metrics
from diffmask_fast.training.recipe import Recipe

PRECISIONS = ("float32", "bfloat16")


def explained(
    model: Any, train: Examples, dev: Examples, recipe: Recipe, masking: str, mask_token: int | None, seed: int,
    precision: str,
) -> Attributions:  # fmt: skip
    torch.manual_seed(seed)
    probe = fresh_probe(model, train, recipe, masking, mask_token=mask_token)
    with tempfile.TemporaryDirectory() as folder:
        train_probe(model, probe, train, recipe, folder, seed=seed, bf16=precision == "bfloat16", quiet=True)
    return explain(model, probe.eval(), dev)


def compared(found: dict[tuple[str, int], Attributions]) -> list[dict[str, Any]]:
    """Per site, of pairs that differ in their precision alone and of those that differ in their seed alone: the share
    of tokens that both keep or both drop, and the mean distance of P(keep). And what each precision keeps."""
    pairs: dict[str, list[tuple[Attributions, Attributions]]] = {"precision": [], "seed": []}
    for (one, first), (other, second) in combinations(found.items(), 2):
        differing = ("precision",) * (one[0] != other[0]) + ("seed",) * (one[1] != other[1])
        if len(differing) == 1:
            pairs[differing[0]].append((first, second))
    metrics = {key: attribution_metrics(one) for key, one in found.items()}
    names = next(iter(found.values())).site_names
    rows: list[dict[str, Any]] = [{"site": name} for name in names]
    for differing, members in pairs.items():
        same = [agreement(pair).same for pair in members]
        for site, row in enumerate(rows):
            distances = [(a.keep[:, site] - b.keep[:, site]).abs().mean().item() for a, b in members]
            row[f"same, another {differing}"] = rounded(one[site].item() for one in same)
            row[f"distance, another {differing}"] = rounded(distances)
    for precision in PRECISIONS:
        own = [rows_of for (name, _), rows_of in metrics.items() if name == precision]
        for site, row in enumerate(rows):
            for key in ("open", "kl", "kept_prediction"):
                row[f"{key}, {precision}"] = rounded(one[site][key] for one in own)
    return rows


def rounded(values: Iterable[float]) -> float | None:
    """Their mean; None where there are none, as of two seeds when there is one."""
    listed = list(values)
    return round(statistics.mean(listed), 4) if listed else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a question-answering model")
    parser.add_argument("--data", required=True, help="SQuAD JSON to train on")
    parser.add_argument("--dev", required=True, help="SQuAD JSON to measure on")
    parser.add_argument("--masking", choices=("input", "hidden"), default="input")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--epochs", type=float, help="instead of the recipe's")
    parser.add_argument("--limit", type=int, help="use only so many questions of each file")
    options = measure.options(str(__doc__), parser)
    model: Any = load_for(options.folder, "QuestionAnswering").to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    train, dev = (encode(tokenizer, read_squad(path)[: options.limit], model) for path in (options.data, options.dev))
    recipe = RECIPES[options.masking]["steady"]
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs)
    found = {}
    for seed in options.seeds:
        for precision in PRECISIONS:
            asked = (model, train, dev, recipe, options.masking, tokenizer.mask_token_id, seed, precision)
            found[precision, seed] = explained(*asked)
    rows = compared(found)
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
