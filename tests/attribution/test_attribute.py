from __future__ import annotations

from typing import Any

import pytest
import torch

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.methods import METHODS
from diffmask_fast.data import encode
from diffmask_fast.moments import state_moments
from diffmask_fast.sites import patch

TEXTS = ["a fine film", "the king was in the old river house", "dull"]
QUICK: dict[str, dict] = {name: {"steps": 10} for name in ("schulz", "guan", "diffmask-per-example", "reinforce")}
SITES = ["embedding", "layer 0", "layer 1", "last"]


@pytest.fixture(scope="module")
def moments(classifier: Any, tokenizer: Any) -> Any:
    return state_moments(classifier, encode(tokenizer, TEXTS, classifier))


@pytest.mark.parametrize("method", METHODS)
def test_a_text_alone_and_in_a_batch_get_the_same(method: str, classifier: Any, tokenizer: Any, moments: Any) -> None:
    options = {"method": method, "moments": moments, **QUICK.get(method, {})}
    together = attribute(classifier, TEXTS, tokenizer, **options)
    for number, text in enumerate(TEXTS):
        alone = attribute(classifier, [text], tokenizer, **options)[0]
        # sums of at most 32 terms in some forty operations and back, and a share of the largest
        torch.testing.assert_close(together[number].keep, alone.keep, rtol=0, atol=1e-4)
        assert together[number].masked == alone.masked


def test_the_size_of_a_score_is_a_share_of_the_largest(classifier: Any, tokenizer: Any) -> None:
    for one in attribute(classifier, TEXTS, tokenizer, method="leave-one-out"):
        assert one.scores is not None
        torch.testing.assert_close(one.keep, one.scores.abs() / one.scores.abs().amax(0))
        assert one.site_names == tuple(SITES)


def test_leaving_a_token_out_costs_what_its_score_says(classifier: Any, tokenizer: Any, moments: Any) -> None:
    result = attribute(classifier, TEXTS[:1], tokenizer, method="leave-one-out", moments=moments)[0]
    inputs = dict(tokenizer(TEXTS[:1], return_tensors="pt"))
    with torch.no_grad(), patch(classifier) as patched:
        output, states = patched.run(inputs, capture=range(4))
        answer = output.logits.argmax(-1)
        before = output.logits.log_softmax(-1)[0, answer]
        for site, state in states.items():
            for token in range(state.shape[1]):
                without = state.clone()
                without[:, token] = moments[site].mean
                after = patched.run(inputs, replace={site: without}).output.logits.log_softmax(-1)[0, answer]
                torch.testing.assert_close(result.scores[token, site], (before - after)[0], rtol=0, atol=1e-5)


def test_integrated_gradients_add_up_to_what_all_states_together_change(
    classifier: Any, tokenizer: Any, moments: Any
) -> None:
    options = {"method": "integrated-gradients", "moments": moments, "steps": 200}
    result = attribute(classifier, TEXTS[:1], tokenizer, **options)[0]
    inputs = dict(tokenizer(TEXTS[:1], return_tensors="pt"))
    with torch.no_grad(), patch(classifier) as patched:
        output, states = patched.run(inputs, capture=range(4))
        answer = output.logits.argmax(-1)
        for site, state in states.items():
            nothing = patched.run(inputs, replace={site: moments[site].mean.expand_as(state).clone()}).output
            change = (output.logits.log_softmax(-1) - nothing.logits.log_softmax(-1))[0, answer][0]
            # completeness (Sundararajan et al. 2017, proposition 1) as far as 200 points of the line go
            torch.testing.assert_close(result.scores[:, site].sum(), change, rtol=1e-3, atol=1e-4)


def test_sites_are_chosen_by_name_or_number(classifier: Any, tokenizer: Any) -> None:
    chosen = attribute(classifier, TEXTS, tokenizer, method="leave-one-out", sites=["last", 1])
    assert chosen.site_names == ("last", "layer 0") and chosen.masking == "hidden"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "there is no method 'magic'; expected one of leave-one-out"),
        ({"sites": ["middle"]}, ValueError, r"can't explain site 'middle'; expected one of 0 \(embedding\)"),
        ({"sites": []}, ValueError, "at least one"),
        ({"steps": 3}, TypeError, "leave-one-out has no option steps; it has none"),
        ({"moments": {}}, ValueError, r"moments has none of the sites \[0, 1, 2, 3\]"),
        ({"method": "integrated-gradients", "steps": 0}, ValueError, "steps is 0; expected a whole number"),
        ({"method": "reinforce", "seed": "a"}, ValueError, "seed is 'a'; expected a whole number"),
        ({"tokenizer": None}, TypeError, "tokenizer is missing"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_clear_error(
    change: dict, error: type, message: str, classifier: Any, tokenizer: Any
) -> None:
    asked = {"tokenizer": tokenizer, "method": "leave-one-out", **change}
    with pytest.raises(error, match=message):
        attribute(classifier, TEXTS, **asked)


def test_moments_are_those_of_all_real_tokens(classifier: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, TEXTS, classifier)
    moments = state_moments(classifier, examples, batch_size=2)
    with torch.no_grad(), patch(classifier) as patched:
        rows: list[list[torch.Tensor]] = [[] for _ in SITES]
        for text in TEXTS:
            states = patched.run(dict(tokenizer([text], return_tensors="pt")), capture=range(4)).states
            for site, state in states.items():
                rows[site].append(state[0].double())
    for site, parts in enumerate(rows):
        states = torch.cat(parts)
        torch.testing.assert_close(moments[site].mean, states.mean(0).float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(moments[site].std, states.std(0, correction=0).float(), rtol=0, atol=1e-5)
