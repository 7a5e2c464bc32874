from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.data import Examples
from diffmask_fast.moments import state_moments
from diffmask_fast.sites import patch, sites_of
from diffmask_fast.tasks import toy

COUNT = 4000
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def examples() -> Examples:
    return toy.toy_examples(COUNT, 0)


def within_five_deviations(hits: int, draws: int, chance: float) -> bool:
    """Five standard deviations of a binomial count: by chance alone once in two million."""
    return abs(hits - draws * chance) <= 5 * math.sqrt(draws * chance * (1 - chance))


def test_lengths_are_uniform_from_one_to_ten(examples: Examples) -> None:
    for length in range(1, 11):
        assert within_five_deviations(examples.lengths.count(length), COUNT, 0.1), length
    assert set(examples.lengths) == set(range(1, 11))


def test_a_query_is_two_different_digits_each_as_likely_as_any(examples: Examples) -> None:
    queries = [item["query"] for item in examples.inputs]
    assert all(len(set(query)) == 2 and set(query) <= set(range(10)) for query in queries)
    for place in (0, 1):
        for digit in range(10):
            assert within_five_deviations([query[place] for query in queries].count(digit), COUNT, 0.1)


def test_half_of_the_digits_are_from_the_query_a_quarter_each(examples: Examples) -> None:
    total = sum(examples.lengths)
    for place in (0, 1):
        hits = sum(item["input_ids"].count(item["query"][place]) for item in examples.inputs)
        assert within_five_deviations(hits, total, 0.25)


def test_the_other_digits_are_alike(examples: Examples) -> None:
    for digit in range(10):
        rows = [item for item in examples.inputs if digit not in item["query"]]
        hits = sum(item["input_ids"].count(digit) for item in rows)
        assert within_five_deviations(hits, sum(len(item["input_ids"]) for item in rows), 0.5 / 8)


def test_the_label_says_whether_the_first_digit_is_there_more_often(examples: Examples) -> None:
    for item in examples.inputs:
        first, second = (item["input_ids"].count(digit) for digit in item["query"])
        assert item["labels"] == (1.0 if first > second else 0.0)
    assert {0.0, 1.0} == {item["labels"] for item in examples.inputs}


def test_the_same_seed_gives_the_same_examples_and_another_one_others() -> None:
    one, again, other = (toy.toy_examples(50, seed) for seed in (0, 0, 1))
    assert one.inputs == again.inputs != other.inputs


def test_an_answer_is_put_in_the_querys_words(examples: Examples) -> None:
    first, second = examples.inputs[3]["query"]
    assert examples.describe(3, [1]) == f"more {first} than {second}"
    assert examples.describe(3, [0]) == f"not more {first} than {second}"


def test_training_and_validation_share_no_example(monkeypatch: pytest.MonkeyPatch, examples: Examples) -> None:
    monkeypatch.setattr(toy, "VALIDATION", 100)
    training, validation = toy.split(examples)
    assert (len(training), len(validation)) == (COUNT - 100, 100)
    assert [*training.inputs, *validation.inputs] == examples.inputs


def test_the_models_sites_are_its_embedding_and_its_encoders_output(examples: Examples) -> None:
    torch.manual_seed(0)
    model, inputs = toy.ToyModel(), examples.collate([examples[i] for i in range(5)])
    assert [site.name for site in sites_of(model)] == ["embedding", "hidden"]
    with torch.no_grad(), patch(model) as patched:
        states = patched.run(inputs, capture=(0, 1)).states
    length = inputs["input_ids"].shape[1]
    assert torch.equal(states[0], model.embedding(inputs["input_ids"]))
    assert states[1].shape == (5, length, 2)


def test_the_model_does_not_see_the_padding(examples: Examples) -> None:
    torch.manual_seed(0)
    model, few = toy.ToyModel(), [examples[i] for i in range(30)]
    together = model(**examples.collate(few))
    alone = torch.cat([model(**examples.collate([item])) for item in few])
    # ten steps of a recurrence of some 64-term sums
    torch.testing.assert_close(together, alone, rtol=0, atol=10 * 64 * EPS)


def by_hand(items: list[tuple[list[int], list[int]]]) -> Examples:
    inputs = [{"query": query, "input_ids": digits, "labels": 0.0} for query, digits in items]
    tokens = [[str(d) for d in digits] for _, digits in items]
    return Examples(
        inputs, tokens, [[1] * len(t) for t in tokens], lambda i, a: "", fixed=frozenset({"query", "labels"})
    )


HAND = by_hand([([1, 2], [1, 5, 2, 2]), ([3, 4], [5, 6]), ([7, 8], [8])])


def attributions(keep: list[list[float]]) -> Attributions:
    """Of `HAND`, one row per token: P(keep) at the embedding and at the hidden state."""
    return Attributions(
        tokens=HAND.tokens,
        site_names=("embedding", "hidden"),
        keep=torch.tensor(keep),
        segments=torch.ones(7, dtype=torch.int8),
        divergence=torch.zeros(3, 2),
        original=[""] * 3,
        masked=[["", ""]] * 3,
        kept_prediction=torch.ones(3, 2, dtype=torch.bool),
        masking="hidden",
    )


def test_the_truth_is_everything_at_the_embedding_and_the_querys_digits_behind_the_encoder() -> None:
    everything, asked = toy.truth(HAND)
    assert [row.tolist() for row in everything] == [[True] * 4, [True] * 2, [True]]
    assert [row.tolist() for row in asked] == [[True, False, True, True], [False, False], [True]]


def test_the_true_attribution_is_at_no_distance() -> None:
    right = [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    for site in toy.distances(attributions(right), HAND).values():
        assert site["kl"] == pytest.approx(0, abs=1e-12) and site["js"] == pytest.approx(0, abs=1e-12)


def test_distances_are_those_worked_out_by_hand_and_leave_out_examples_without_a_query_digit() -> None:
    # embedding: first text 1, 1, 1, 0; hidden: first text 1/2 on each of two right ones of three, and all on the last
    keep = [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [0.0, 0.5], [1.0, 1.0], [0.0, 0.0], [0.3, 0.2]]
    got = toy.distances(attributions(keep), HAND)
    assert got["embedding"]["kl"] == math.inf  # the truth needs a token that the attribution gives nothing
    thirds, quarters = [1 / 3, 0, 1 / 3, 1 / 3], [1 / 4] * 4
    kl = math.log(4 / 3)
    middle = [(p + q) / 2 for p, q in zip(thirds, quarters, strict=True)]
    js = sum(p * math.log(p / m) for p, m in zip(thirds, middle, strict=True) if p) / 2
    js += sum(q * math.log(q / m) for q, m in zip(quarters, middle, strict=True)) / 2
    # the text of one digit is at no distance, the one without a digit of its query does not count
    assert got["hidden"]["kl"] == pytest.approx(kl / 2, rel=1e-6)
    assert got["hidden"]["js"] == pytest.approx(js / 2, rel=1e-6)
    assert got["embedding"]["js"] < math.log(2)
    # two numbers of which one is 0
    assert got["hidden"]["kl_sd"] == pytest.approx(kl / math.sqrt(2), rel=1e-6)
    assert got["hidden"]["js_sd"] == pytest.approx(js / math.sqrt(2), rel=1e-6)
    assert got["hidden"]["open"] == pytest.approx((0.5 + 0.5 + 0.2) / 3, rel=1e-6)


def test_a_distance_does_not_depend_on_the_scale_of_the_attribution() -> None:
    keep = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    one, half = (toy.distances(attributions((keep * scale).tolist()), HAND) for scale in (1.0, 0.5))
    for site in one:
        assert one[site]["kl"] == pytest.approx(half[site]["kl"], rel=1e-5)


def test_an_attribution_of_nothing_has_nothing_in_common_with_the_truth() -> None:
    assert toy.divergences(torch.tensor([1.0, 0.0]), torch.zeros(2)) == (math.inf, math.log(2))
    # the limit that it continues: all that is given is given to what is not needed
    kl, js = toy.divergences(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.3]))
    assert kl == math.inf and js == pytest.approx(math.log(2))


def test_the_table_has_every_method_at_both_sites_and_is_what_each_method_says_by_itself() -> None:
    torch.manual_seed(0)
    model, examples = toy.ToyModel(), toy.toy_examples(60, 0)
    training, validation = examples.select(range(40)), examples.select(range(40, 60))
    options = {"schulz": {"steps": 5}, "guan": {"steps": 5}, "integrated-gradients": {"steps": 5}}
    methods = ["leave-one-out", *options]
    said = toy.explained(model, training, validation, methods, options)
    table = {method: toy.distances(found, validation) for method, found in said.items()}
    assert list(table) == methods
    moments = state_moments(model, training)
    for method, sites in table.items():
        # the same in another order and batches gives the same: sums of at most 192 terms on values near one
        for site in ("hidden", "embedding"):
            alone = attribute(
                model,
                validation,
                method=method,
                sites=[site],
                moments=moments,
                batch_size=4,
                **options.get(method, {}),
            )
            expected = toy.distances(alone, validation)[site]
            assert sites[site] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_table_of_a_method_that_explains_layers_only_is_refused() -> None:
    examples = toy.toy_examples(4, 0)
    with pytest.raises(ValueError, match="attention explains states that enter a layer"):
        toy.explained(toy.ToyModel(), examples, examples, ["attention"])


def test_relative_entropy_counts_nothing_where_the_truth_is_zero() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    assert toy.relative_entropy(p, q).item() == pytest.approx(math.log(2))
    assert toy.relative_entropy(p, p).item() == 0


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "EXAMPLES", 300)
    monkeypatch.setattr(toy, "VALIDATION", 60)
    small = {name: replace(recipe, epochs=2, batch_size=32) for name, recipe in toy.RECIPES.items()}
    monkeypatch.setattr(toy, "RECIPES", small)


@pytest.mark.usefixtures("shrunk")
@pytest.mark.parametrize("recipe", ["steady", "published"])
def test_a_run_leaves_metrics_probe_attributions_and_pictures(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics = toy.run(tmp_path / "run", seed=1, recipe=recipe, quiet=True)
    assert 0 <= metrics["task_accuracy"] <= 1
    assert set(metrics["sites"]) == {"embedding", "hidden"}
    for site in metrics["sites"].values():
        assert set(site) == {"kl", "js", "kl_sd", "js_sd", "open"} and all(
            math.isfinite(value) for value in site.values()
        )
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {
        "metrics.json",
        "config.json",
        "probe.safetensors",
        "model.safetensors",
        "attributions.safetensors",
    }
    assert left >= {"report.html", "example.png", "by_site.png"}
    assert len(Attributions.load(tmp_path / "run" / "attributions.safetensors")) == 60


@pytest.mark.usefixtures("shrunk")
def test_the_same_seed_gives_the_same_metrics_and_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    one, other = (toy.run(tmp_path / name, quiet=True) for name in ("one", "other"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert toy.run(tmp_path / "one", resume=True, quiet=True) == one


@pytest.mark.usefixtures("shrunk")
def test_a_run_that_stopped_between_network_and_probe_resumes_to_the_same_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy.run(tmp_path / "whole", quiet=True)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("diffmask_fast.training.trainer.train_probe", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.run(tmp_path / "stopped", quiet=True)
    assert (tmp_path / "stopped" / "model.safetensors").exists()
    resumed = toy.run(tmp_path / "stopped", resume=True, quiet=True)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
