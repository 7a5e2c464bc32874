"""What bench/precision.py compares: pairs that differ in one thing alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import precision as bench
from tiny_probe import a_probe

from diffmask_fast import Attributions, explain
from diffmask_fast.data import encode

TEXTS = ["a fine film", "the old king in the river", "dull"]


def test_pairs_differ_in_their_precision_or_in_their_seed(classifier, tokenizer) -> None:
    examples = encode(tokenizer, TEXTS, classifier)
    base = explain(classifier, a_probe(), examples)

    def moved(by: float) -> Attributions:
        return Attributions(
            **{
                name: getattr(base, name)
                for name in ("tokens", "site_names", "segments", "divergence", "original", "masked", "kept_prediction")
            },
            keep=torch.full_like(base.keep, 0.4 + by),
        )

    # float32 and bfloat16 of a seed are 0.05 apart, two seeds 0.2
    found = {
        (name, seed): moved(0.05 * (name == "bfloat16") + 0.2 * seed) for seed in (0, 1) for name in bench.PRECISIONS
    }
    for row in bench.compared(found):
        assert row["distance, another precision"] == pytest.approx(0.05, abs=1e-4)
        assert row["distance, another seed"] == pytest.approx(0.2, abs=1e-4)
        assert row["same, another precision"] == 1.0 and row["same, another seed"] == 0.0
        assert row["open, float32"] == row["open, bfloat16"] == 0.5
    alone = bench.compared({key: one for key, one in found.items() if key[1] == 0})
    assert alone[0]["same, another seed"] is None and alone[0]["same, another precision"] == 1.0
