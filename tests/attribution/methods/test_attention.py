from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.sites import register_sites
from diffmask_fast.tasks.toy import ToyModel, toy_examples

TEXTS = ["a fine film", "the king was in the old river house", "dull"]


@pytest.fixture
def model(tiny_bert: Any) -> Any:
    return tiny_bert(attn_implementation="sdpa")


def eager_weights(tiny_bert: Any, tokenizer: Any, text: str) -> Any:
    with torch.no_grad():
        inputs = tokenizer([text], return_tensors="pt")
        return tiny_bert(attn_implementation="eager")(**inputs, output_attentions=True).attentions


def test_a_score_is_what_the_largest_head_gives_the_token_on_average_over_the_texts_own_queries(
    model: Any, tiny_bert: Any, tokenizer: Any
) -> None:
    result = attribute(model, TEXTS, tokenizer, method="attention")
    assert result.site_names == ("layer 0", "layer 1")
    for one, text in zip(result, TEXTS, strict=True):
        assert one.scores is not None
        for layer, weights in enumerate(eager_weights(tiny_bert, tokenizer, text)):
            # two layers of sums of at most 32 terms on values near one, alone and among padding
            torch.testing.assert_close(one.scores[:, layer], weights[0].amax(0).mean(0), rtol=0, atol=1e-5)


def test_the_model_keeps_its_own_attention(model: Any, tokenizer: Any) -> None:
    attribute(model, TEXTS, tokenizer, method="attention", sites=["layer 1"])
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(**tokenizer(TEXTS[:1], return_tensors="pt"), output_attentions=False).attentions is None


def test_it_gets_its_attention_back_when_the_pass_fails(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model).forward

    def fails(self: Any, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        if output_attentions:
            raise MemoryError("too long")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", fails)
    with pytest.raises(MemoryError):
        attribute(model, TEXTS, tokenizer, method="attention")
    assert model.config._attn_implementation == "sdpa"


def test_one_pass_serves_all_sites_of_a_batch(model: Any, tokenizer: Any) -> None:
    asked: Counter = Counter()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: asked.update([bool(kwargs.get("output_attentions"))]), with_kwargs=True
    )
    attribute(model, TEXTS, tokenizer, method="attention", batch_size=2)
    assert asked[True] == 2  # two batches, two sites


def test_a_model_whose_states_enter_no_layer_is_refused() -> None:
    for sites in (None, ["hidden"]):
        with pytest.raises(ValueError, match="attention explains states that enter a layer, and no site of this model"):
            attribute(ToyModel(), toy_examples(4, 0), method="attention", sites=sites)


def test_an_attention_that_gives_no_weights_and_cannot_be_changed_is_refused(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    forward = type(model).forward
    monkeypatch.setattr(  # what such a model does where it does not go back to the eager attention by itself
        type(model), "forward", lambda self, *args, output_attentions=False, **kwargs: forward(self, *args, **kwargs)
    )
    with pytest.raises(ValueError, match="load the model with attn_implementation='eager'"):
        attribute(model, TEXTS, tokenizer, method="attention")


class Layered(torch.nn.Module):
    """A layer, but no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)

    def forward(self, query: Any, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        return self.layer(self.embedding(input_ids))[:, 0]


def test_a_layer_without_attention_is_refused() -> None:
    register_sites(Layered, [("embedding", "embedding", "output"), ("layer", "layer", "input")])
    with pytest.raises(ValueError, match="Layered has no attention that transformers knows of: use another method"):
        attribute(Layered(), toy_examples(4, 0), method="attention")
