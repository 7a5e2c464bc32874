"""What bench/draws.py measures, on a run small enough for a test."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import draws as bench

from diffmask_fast.data import encode
from diffmask_fast.tasks.squad import RECIPES

TEXTS = [("who was king ?", "the old king walked in münchen ."), ("what is red ?", "a red house , a blue bird")] * 4


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_every_way_has_a_row(masking: str, tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert("ForQuestionAnswering")
    recipe = replace(RECIPES[masking]["steady"], corrupted=0.0, epochs=2.0)
    ways = [(8, 1), (4, 2), (2, 4)]
    rows = bench.rows_of(model, encode(tokenizer, TEXTS, model), recipe, masking, None, ways, 4)
    assert [(row["texts"], row["draws"]) for row in rows] == ways
    for row in rows:
        assert row["seconds"] > 0 and -1 <= row["alike"] <= 1
        cost, first = row["noise"] * row["seconds"], rows[0]["noise"] * rows[0]["seconds"]
        assert row["worth"] == pytest.approx(first / cost, rel=0.05)  # all of them rounded


def test_the_correlation_within_a_text_is_the_share_of_variance_between_texts() -> None:
    torch.manual_seed(0)
    texts, draws = 2.0 * torch.randn(4000, 1, 5), torch.randn(4000, 2, 5)
    # of 4 + 1 parts of variance 4 are the text's; its error is about 1 / sqrt(4000 * 5)
    assert bench.alike(3 + texts + draws) == pytest.approx(0.8, abs=0.03)
    assert bench.alike(3 + texts.expand(-1, 2, -1)) == pytest.approx(1.0)


def test_the_noise_of_draws_on_one_text_is_that_of_as_many_texts_only_if_they_have_nothing_in_common() -> None:
    assert bench.noise(0.0, 4, 2) == bench.noise(0.0, 8, 1) == bench.noise(1.0, 8, 1) == 1 / 8
    assert bench.noise(1.0, 4, 2) == 1 / 4


@pytest.mark.parametrize("text", ["8", "0x1", "x2", "2x", "axb"])
def test_a_way_that_is_none_is_refused(text: str) -> None:
    assert bench.way("4x2") == (4, 2)
    with pytest.raises(argparse.ArgumentTypeError, match="expected texts x draws"):
        bench.way(text)
