from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import encode
from diffmask_fast.probes import Probe
from diffmask_fast.training.evaluation import _draw, attribution_metrics, by_site, sampled_metrics

TEXTS = [
    "a fine film",
    "the old king walked in paris .",
    "dull",
    "who was the new queen ?",
    "a cat",
    "a red house",
]


def a_probe(masking: str, bias: float) -> Probe:
    torch.manual_seed(1)
    probe = Probe([16] * 4, masking, bound=1.0, bias=bias)
    for baseline in probe.baselines:
        nn.init.normal_(baseline)
    return probe


def measure(tiny_bert: Any, tokenizer: Any, probe: Probe, **options: Any) -> list[dict[str, float]]:
    model = tiny_bert()
    return sampled_metrics(model, probe, encode(tokenizer, TEXTS, model), **options)


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_open_gates_leave_everything_as_it_was(masking: str, tiny_bert: Any, tokenizer: Any) -> None:
    for site in measure(tiny_bert, tokenizer, a_probe(masking, 100.0)):
        assert site["sampled_open"] == site["sampled_kept_prediction"] == 1
        assert site["sampled_kl"] == pytest.approx(0, abs=1e-6)  # gates within float32 of 1


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_closed_gates_drop_every_token(masking: str, tiny_bert: Any, tokenizer: Any) -> None:
    for site in measure(tiny_bert, tokenizer, a_probe(masking, -100.0)):
        assert site["sampled_open"] == 0 and site["sampled_kl"] > 1e-3


def test_input_masking_keeps_fewer_tokens_the_deeper_it_looks(tiny_bert: Any, tokenizer: Any) -> None:
    opened = [site["sampled_open"] for site in measure(tiny_bert, tokenizer, a_probe("input", 0.5))]
    assert opened == sorted(opened, reverse=True) and opened[0] > opened[-1]


def test_the_share_of_open_gates_is_the_probability_that_the_law_gives(tiny_bert: Any, tokenizer: Any) -> None:
    probe = a_probe("hidden", 0.0)
    for head in probe.heads:
        head.outer.parametrizations.weight.original0.data.zero_()
    texts = ["a " * 30] * 40
    model = tiny_bert()
    chance = 1 / (1 + 0.2**0.2)  # sigmoid(0 - temperature * log(-left / right))
    draws = 40 * 32
    for site in sampled_metrics(model, probe, encode(tokenizer, texts, model)):
        # five standard deviations of a mean of that many draws
        assert abs(site["sampled_open"] - chance) < 5 * (chance * (1 - chance) / draws) ** 0.5


def test_the_same_seed_measures_the_same_and_another_one_something_else(tiny_bert: Any, tokenizer: Any) -> None:
    first, again, other = (measure(tiny_bert, tokenizer, a_probe("input", 0.5), seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_measuring_draws_nothing_from_the_global_generator(tiny_bert: Any, tokenizer: Any) -> None:
    model, probe = tiny_bert(), a_probe("input", 0.5)
    examples = encode(tokenizer, TEXTS, model)
    before = torch.get_rng_state()
    sampled_metrics(model, probe, examples)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_window_of_a_long_text_is_measured_for_itself(tiny_bert: Any, tokenizer: Any) -> None:
    model, probe = tiny_bert(), a_probe("input", 0.5)
    examples = encode(tokenizer, ["a fine film", "the old king walked in paris . " * 10], model)
    assert examples.windows is not None and len(examples) == 5
    assert sampled_metrics(model, probe, examples) == sampled_metrics(model, probe, replace(examples, windows=None))
    by_text = attribution_metrics(explain(model, probe, examples))
    by_window = attribution_metrics(explain(model, probe, replace(examples, windows=None)))
    # the mean over two texts, one of which has the mean over its four windows; not over five windows
    short, long = explain(model, probe, examples).divergence
    assert [site["kl"] for site in by_text] == pytest.approx(((short + long) / 2).tolist())
    assert [site["kl"] for site in by_window] == pytest.approx(((short + 4 * long) / 5).tolist())


def test_sites_of_hidden_masking_draw_independent_gates() -> None:
    probe = a_probe("hidden", 0.0)
    for head in probe.heads:
        head.outer.parametrizations.weight.original0.data.zero_()
    gates = torch.stack(_draw(probe, {i: torch.zeros(4, 50, 16) for i in range(4)}, torch.tensor([1, 2])))
    assert gates.shape == (4, 4, 50)
    between = (gates > 0) & (gates < 1)
    for i in range(3):
        # all heads say the same, so gates between 0 and 1 are alike only where their uniforms are
        both = between[i] & between[i + 1]
        assert both.sum() > 10 and (gates[i] != gates[i + 1])[both].all()


def attributions(second_segment: bool) -> Attributions:
    return Attributions(
        tokens=[["a", "b", "c", "d"], ["e", "f"]],
        site_names=("embedding", "last"),
        keep=torch.tensor([[0.9, 0.6], [0.8, 0.5], [0.51, 0.2], [0.7, 0.1], [0.6, 0.9], [0.4, 0.3]]),
        segments=torch.tensor([0, 1, 2, 2, 1, 2] if second_segment else [0, 1, 1, 1, 1, 1], dtype=torch.int8),
        divergence=torch.tensor([[0.0, 2.0], [1.0, 4.0]]),
        original=["x", "y"],
        masked=[["x", "y"], ["y", "y"]],
        kept_prediction=torch.tensor([[True, False], [True, True]]),
    )


def test_attribution_metrics_threshold_at_one_half_and_average_over_texts() -> None:
    embedding, last = attribution_metrics(attributions(second_segment=False))
    assert embedding == pytest.approx({"kl": 0.5, "open": (4 / 4 + 1 / 2) / 2, "kept_prediction": 1.0})
    assert last == pytest.approx({"kl": 3.0, "open": (1 / 4 + 1 / 2) / 2, "kept_prediction": 0.5})


def test_attributions_that_were_looked_at_before_are_measured_the_same() -> None:
    seen = attributions(second_segment=True)
    assert seen[0].tokens and seen.mean_keep().shape == (2,)
    assert attribution_metrics(seen) == attribution_metrics(attributions(second_segment=True))


def test_pairs_are_measured_by_segment_too() -> None:
    embedding, last = attribution_metrics(attributions(second_segment=True))
    assert (embedding["open_question"], embedding["open_passage"]) == (1.0, 0.5)
    assert (last["open_question"], last["open_passage"]) == (0.5, 0.0)


def test_by_site_joins_the_rows_of_a_site_and_averages_over_sites() -> None:
    joined = by_site(("a", "b"), [{"kl": 1.0}, {"kl": 3.0}], [{"open": 0.5}, {"open": 0.25}])
    assert joined == {
        "sites": {"a": {"kl": 1.0, "open": 0.5}, "b": {"kl": 3.0, "open": 0.25}},
        "overall": {"kl": 2.0, "open": 0.375},
    }
