from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_probe import TOLERANCE, a_probe
from token_lists import single

from diffmask_fast.analysis.faithfulness import (
    RANDOM,
    Step,
    faithfulness,
    importance_ranks,
    line_names,
    open_gates,
    random_order,
)
from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import encode
from diffmask_fast.moments import state_moments
from diffmask_fast.sites import patch

TEXTS = ["a fine film", "the king was in the old river house", "dull", "what is red , green or blue"]
PAIRS = [("who was king", "the old king walked in paris ."), ("what is red", "a red house , a blue bird")]


def plain(model: Any, examples: Any, keep: list[list[float]], site: int, shares: Any, rationales: Any) -> dict:
    """The same text by text and token by token, for classes."""
    home = state_moments(model, examples, [site])[site].mean
    sums: dict[str, list[float]] = {"kept": [0.0] * len(shares), "kl": [0.0] * len(shares)}
    sums |= {"comprehensiveness": [0.0] * len(rationales), "sufficiency": [0.0] * len(rationales)}
    with torch.no_grad(), patch(model) as patched:
        for i, own in enumerate(keep):
            inputs = examples.collate([examples[i]])
            output, states = patched.run(inputs, capture=[site])
            before = output.logits.double().softmax(-1)[0]
            order = sorted(range(len(own)), key=own.__getitem__)

            def after(gone: list[int], inputs: Any = inputs, state: Any = states[site]) -> Any:
                changed = state.clone()
                changed[0, gone] = home
                return patched.run(inputs, replace={site: changed}).output.logits.double().softmax(-1)[0]

            for at, share in enumerate(shares):
                masked = after(order[: math.floor(share * len(own))])
                sums["kept"][at] += float(masked.argmax() == before.argmax()) / len(keep)
                sums["kl"][at] += (before * (before / masked).log()).sum().item() / len(keep)
            best = before.argmax()
            for at, share in enumerate(rationales):
                top = math.ceil(share * len(own))
                most, rest = order[len(own) - top :], order[: len(own) - top]
                sums["comprehensiveness"][at] += (before[best] - after(most)[best]).item() / len(keep)
                sums["sufficiency"][at] += (before[best] - after(rest)[best]).item() / len(keep)
    return sums


@pytest.mark.parametrize("site", ["embedding", "layer 1"])
def test_curves_and_scores_are_those_of_a_plain_spelling(site: str, classifier: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, TEXTS, classifier)
    attributions = attribute(classifier, examples, method="leave-one-out")
    shares, rationales = (0.0, 0.25, 0.5, 1.0), (0.125, 0.5)  # exact in binary
    found = faithfulness(classifier, examples, [attributions], site=site, shares=shares, rationales=rationales)
    at = attributions.site_names.index(site)
    keep = [text.keep[:, at].tolist() for text in attributions]
    wanted = plain(classifier, examples, keep, at, shares, rationales)
    line = found.lines[0]
    assert line.name == "leave-one-out" and found.site == site and found.examples == len(TEXTS)
    assert line.kept_prediction == pytest.approx(wanted["kept"])
    for mine, theirs in (
        (line.divergence, wanted["kl"]),
        (line.comprehensiveness, wanted["comprehensiveness"]),
        (line.sufficiency, wanted["sufficiency"]),
    ):
        assert mine == pytest.approx(theirs, rel=0, abs=TOLERANCE)
    assert line.mean_sufficiency == pytest.approx(sum(wanted["sufficiency"]) / 2, abs=TOLERANCE)
    assert line.mean_comprehensiveness == pytest.approx(sum(wanted["comprehensiveness"]) / 2, abs=TOLERANCE)


def test_nothing_masked_changes_nothing_and_all_masked_is_alike_for_every_order(reader: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, PAIRS, reader)
    both = [explain(reader, a_probe(), examples), attribute(reader, examples, method="leave-one-out")]
    found = faithfulness(reader, examples, both, shares=(0, 0.5, 1), rationales=(0, 1))
    assert [line.name for line in found.lines] == ["diffmask", "leave-one-out", RANDOM]
    for line in found.lines:
        assert line.kept_prediction[0] == 1.0
        assert line.divergence[0] == pytest.approx(0, abs=TOLERANCE)
        assert line.comprehensiveness[0] == pytest.approx(0, abs=TOLERANCE)  # an empty rationale is not missed
        assert line.sufficiency[1] == pytest.approx(0, abs=TOLERANCE)  # a rationale of all tokens is enough
        assert line.divergence[2] == pytest.approx(found.lines[-1].divergence[2], abs=TOLERANCE)
        assert line.comprehensiveness[1] == pytest.approx(line.sufficiency[0], abs=TOLERANCE)


def test_the_batch_size_changes_nothing(classifier: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, TEXTS, classifier)
    attributions = [explain(classifier, a_probe(), examples)]
    one, all_at_once = (faithfulness(classifier, examples, attributions, batch_size=size) for size in (1, 16))
    for here, there in zip(one.lines, all_at_once.lines, strict=True):
        assert here.kept_prediction == there.kept_prediction
        assert here.divergence == pytest.approx(there.divergence, abs=TOLERANCE)
        assert here.sufficiency == pytest.approx(there.sufficiency, abs=TOLERANCE)


def test_a_text_in_windows_is_masked_window_by_window(reader: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, [("who was king", "the old king walked in paris . " * 6), PAIRS[1]], reader)
    assert len(examples) > 2
    found = faithfulness(reader, examples, [explain(reader, a_probe(), examples)], shares=(0, 1))
    assert found.examples == len(examples) and found.lines[0].kept_prediction[0] == 1.0


def test_tokens_alike_come_in_the_random_order() -> None:
    chance = torch.tensor([2, 0, 3, 1])
    assert importance_ranks(torch.tensor([0.5, 0.5, 0.5, 0.5]), chance)[chance].tolist() == [0, 1, 2, 3]
    assert importance_ranks(torch.tensor([0.5, 0.1, 0.5, 0.9]), chance).tolist() == [2, 0, 1, 3]


def test_the_random_order_depends_on_the_seed_and_the_example_alone() -> None:
    assert random_order(9, 0, 3).tolist() == random_order(9, 0, 3).tolist()
    assert sorted(random_order(9, 0, 3).tolist()) == list(range(9))
    assert len({tuple(random_order(9, seed, example).tolist()) for seed in range(3) for example in range(3)}) == 9


@pytest.mark.parametrize(
    ("share", "length", "least", "masked"),
    [(0.29, 100, True, 29), (0.7, 10, True, 7), (0.3, 7, True, 2), (0.01, 7, False, 1), (0.29, 100, False, 29)],
)
def test_shares_are_rounded_down_for_the_least_and_up_for_the_most_important(
    share: float, length: int, least: bool, masked: int
) -> None:
    gates = open_gates(torch.arange(length), Step(share, least))
    gone = (gates == 0).nonzero().flatten().tolist()
    assert gone == (list(range(masked)) if least else list(range(length - masked, length)))


def test_the_result_is_saved_as_json(classifier: Any, tokenizer: Any, tmp_path: Path) -> None:
    examples = encode(tokenizer, TEXTS[:2], classifier)
    found = faithfulness(classifier, examples, [explain(classifier, a_probe(), examples)] * 2, shares=(0, 1))
    found.save(tmp_path / "faithfulness.json")
    read = json.loads((tmp_path / "faithfulness.json").read_text())
    assert read["shares"] == [0, 1] and [line["name"] for line in read["lines"]] == ["diffmask 0", "diffmask 1", RANDOM]
    assert read["lines"][0]["divergence"] == found.lines[0].divergence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": (0.5, 1.5)}, "shares: expected numbers from 0 to 1"),
        ({"rationales": ()}, "rationales: expected"),
        ({"site": "middle"}, "no site 'middle'; expected one of embedding, layer 0, layer 1, last"),
        ({"site": "last"}, "input masking replaces states at embedding, and not at last"),
        ({"attributions": []}, "attributions is empty"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_clear_error(
    change: dict, message: str, classifier: Any, tokenizer: Any
) -> None:
    examples = encode(tokenizer, TEXTS, classifier)
    asked = {"attributions": [explain(classifier, a_probe(), examples)], **change}
    with pytest.raises(ValueError, match=message):
        faithfulness(classifier, examples, **asked)


def test_other_texts_or_sites_than_those_attributed_are_refused(make: Any, classifier: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, TEXTS[:2], classifier)
    for texts, message in (
        ([single("a fine film")], "got 2 texts and attributions of 1"),
        ([single("a fine film"), single("dull")], "text 1 begins with .* and its attribution with"),
    ):
        with pytest.raises(ValueError, match=message):
            faithfulness(classifier, examples, [make(texts)])
    hidden = attribute(classifier, examples, method="leave-one-out", sites=["last"])
    with pytest.raises(ValueError, match="leave-one-out explained last, and not layer 0"):
        faithfulness(classifier, examples, [hidden], site="layer 0")


@pytest.mark.parametrize(
    ("maskings", "names"),
    [
        (["hidden"], ["diffmask"]),
        (["hidden", "hidden"], ["diffmask 0", "diffmask 1"]),
        (["input", "hidden"], ["diffmask, input", "diffmask, hidden"]),
        (["input", "hidden", "input"], ["diffmask, input 0", "diffmask, hidden", "diffmask, input 1"]),
    ],
)
def test_lines_of_one_method_are_told_apart_by_what_is_masked_or_by_number(
    maskings: list[str], names: list[str]
) -> None:
    attributions: Any = [SimpleNamespace(method="diffmask", masking=masking) for masking in maskings]
    other: Any = SimpleNamespace(method="schulz", masking="hidden")
    assert line_names([*attributions, other]) == [*names, "schulz", RANDOM]
