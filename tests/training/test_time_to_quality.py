"""What bench/time_to_quality.py calls quality and time, on a run small enough for a test."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import time_to_quality as bench
import train_step
from tiny_probe import a_probe

from diffmask_fast.data import encode
from diffmask_fast.tasks.squad import RECIPES
from diffmask_fast.training.evaluation import attribution_metrics
from diffmask_fast.training.objective import GROWN

TEXTS = [
    ("who was king ?", "the old king walked in münchen ."),
    ("where is the film ?", "a dull film in paris , the city of year 1"),
    ("what is red ?", "a red house , a blue bird"),
] * 6


def test_a_site_over_the_tolerance_counts_as_wholly_open() -> None:
    rows = [{"kl": 0.2, "open": 0.5}, {"kl": 0.55, "open": 0.3}, {"kl": 0.56, "open": 0.1}]
    assert bench.quality(rows, 0.5) == pytest.approx((0.5 + 0.3 + 1.0) / 3)


def test_a_look_is_the_probe_as_it_was_then(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert("ForQuestionAnswering")
    recipe = replace(RECIPES["input"]["steady"], epochs=2.0)
    looks = bench.trained(model, encode(tokenizer, TEXTS, model), recipe, "input", None, 0, 3, lambda look: False)
    assert [look.step for look in looks] == [1, 2, 3, 4, 5, 6]  # 18 texts, 8 a step
    assert all(one.seconds < other.seconds for one, other in pairwise(looks))
    bounds = [look.probe.heads[0].bound for look in looks]
    assert bounds == pytest.approx(
        [3 + (recipe.bound - 3) * min(1.0, step / 6 / GROWN) for step in range(6)]
    )  # as the recipe says
    states = [torch.cat([p.flatten() for p in look.probe.parameters()]) for look in looks]
    assert all(not torch.equal(one, other) for one, other in pairwise(states))


@pytest.mark.slow
@pytest.mark.parametrize("reached", [True, False])
def test_a_small_run_gives_a_row_with_all_its_columns(
    reached: bool, tiny_bert: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "PADDED", 32)
    monkeypatch.setattr(bench, "quality", lambda rows, tolerance: next(qualities))
    # the published recipe's two looks, then ours until one is as good
    qualities = iter([0.9, 0.8, 0.95, 0.8 if reached else 0.81, *[0.81] * 10])
    model = tiny_bert("ForQuestionAnswering")
    examples = encode(tokenizer, TEXTS, model)
    of = RECIPES["hidden"]
    recipes = {"ours": replace(of["steady"], epochs=2.0), "published": replace(of["published"], epochs=2.0)}
    row = bench.row(model, examples, examples, "hidden", None, 0, recipes, None)
    assert row["published_steps"] == 6 and row["open_published"] == 0.8
    assert row["seconds_published"] == pytest.approx(6 * row["published_step"], abs=0.05 + 6 * 0.0005)
    assert (row["open"], row["speedup"] is not None) == ((0.8, True) if reached else (0.81, False))
    assert set(row) >= {"masking", "seed", "seconds_published", "seconds", "kl", "open", "speedup"}
    # against that row: only ours is looked at
    qualities = iter([0.9, 0.75])
    again = bench.row(model, examples, examples, "hidden", None, 0, recipes, row)
    assert (again["published_steps"], again["open_published"], again["open"]) == (6, 0.8, 0.75)


def test_a_training_ends_with_the_first_look_that_is_enough_and_looking_takes_no_time(
    tiny_bert: Any, tokenizer: Any
) -> None:
    model = tiny_bert("ForQuestionAnswering")
    recipe = replace(RECIPES["input"]["steady"], epochs=2.0)

    def enough(look: bench.Look) -> bool:
        time.sleep(2)
        return look.step >= 3

    looks = bench.trained(model, encode(tokenizer, TEXTS, model), recipe, "input", None, 0, 3, enough)
    assert [look.step for look in looks] == [1, 2, 3]
    assert looks[2].seconds - looks[0].seconds < 2  # two steps of a tiny model, and not two looks


def test_a_published_training_that_was_stopped_goes_on_to_the_same_looks(
    tiny_bert: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_bert("ForQuestionAnswering")
    examples = encode(tokenizer, TEXTS, model)
    recipe = replace(RECIPES["input"]["published"], epochs=2.0)
    monkeypatch.setattr(bench, "train_probe", partial(bench.train_probe, save_steps=2))
    looked: list[int] = []

    def measured_until(last: int) -> Any:
        def measured(model: Any, dev: Any, look: bench.Look, tolerance: float, name: str) -> tuple[float, float]:
            if look.step > last:
                raise KeyboardInterrupt
            looked.append(look.step)
            return torch.cat([p.flatten() for p in look.probe.parameters()]).sum().item(), 0.0

        return measured

    def looks(folder: str, last: int) -> dict[int, float]:
        monkeypatch.setattr(bench, "measured", measured_until(last))
        return bench.published_looks(
            model, examples, examples, "input", None, 0, recipe, recipe.tolerance, tmp_path / folder
        )

    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole").mkdir()
    whole = looks("whole", 6)
    with pytest.raises(KeyboardInterrupt):
        looks("stopped", 5)
    looked.clear()
    assert looks("stopped", 6) == whole and looked == [6] and list(whole) == [3, 6]
    looked.clear()
    assert looks("stopped", 6) == whole and not looked  # done: read


def test_the_divergence_of_a_look_is_the_largest_of_a_site(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert("ForQuestionAnswering")
    examples = encode(tokenizer, TEXTS[:3], model)
    found, divergence = bench.measured(model, examples, bench.Look(1, 1.0, a_probe()), 1.0, "ours")
    with bench.running_in(model, torch.bfloat16 if bench.multiplies_bfloat16() else None):
        rows = attribution_metrics(bench.explain(model, a_probe().eval(), examples))
    assert divergence == max(row["kl"] for row in rows) > 0 and found == bench.quality(rows, 1.0)


def test_rows_of_an_earlier_run_are_taken_by_masking_and_seed(tmp_path: Path) -> None:
    row = {"masking": "input", "seed": 1, "published_steps": 4860, "open_published": 0.929}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row | {"speedup": 47}]}))
    found = bench.earlier_rows(str(tmp_path / "rows.json"))
    assert found == {("input", 1): {"published_steps": 4860, "open_published": 0.929}}


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": 1}', '{"rows": [{"masking": "input", "seed": 0}]}'])
def test_a_file_without_such_rows_is_refused_with_what_is_expected(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"--against .*rows\.json: .*rows of masking, seed, published_steps"):
        bench.earlier_rows(str(path))


def test_a_recipe_that_a_masking_does_not_have_is_refused_with_those_it_has() -> None:
    assert bench.chosen_recipes("decided", ["input"]) == {"input": RECIPES["input"]["decided"]}
    with pytest.raises(SystemExit, match="hidden masking: there is no recipe 'decided'; expected one of steady, publ"):
        bench.chosen_recipes("decided", ["input", "hidden"])


def test_a_file_that_lacks_a_row_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"masking": "input", "seed": 1, "published_steps": 4860, "open_published": 0.929}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row]}))
    given = {"folder": "none", "data": "none", "dev": "none", "masking": "input", "against": tmp_path / "rows.json"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["time_to_quality.py", *words, "--seeds", "1", "2"])
    with pytest.raises(SystemExit, match=r"rows\.json has no row for \[\('input', 2\)\]: leave those out"):
        bench.main()
