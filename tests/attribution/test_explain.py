from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_probe import TOLERANCE, a_probe
from torch import nn

from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import Examples, encode
from diffmask_fast.probes import Probe
from diffmask_fast.sites import Patched
from diffmask_fast.tasks.toy import ToyModel, toy_examples

TEXTS = ["a fine film", "the old king walked in paris .", "dull", "who was the new queen of the city ?"]
PAIRS = [
    ("who was king?", "the old king walked in münchen ."),
    ("where?", "a dull film in paris"),
    ("what?", "a cat"),
]


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_a_text_is_explained_alike_alone_and_padded_in_a_batch(
    masking: str, head: str, tiny_bert: Any, tokenizer: Any
) -> None:
    model, texts = tiny_bert(head), PAIRS if head == "ForQuestionAnswering" else TEXTS
    together = explain(model, a_probe(masking), texts, tokenizer)
    for i, text in enumerate(texts):
        alone, padded = explain(model, a_probe(masking), [text], tokenizer)[0], together[i]
        # a token at the threshold could go either way: the comparison must not rest on one
        assert ((alone.keep - 0.5).abs() > TOLERANCE).all()
        torch.testing.assert_close(padded.keep, alone.keep, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(padded.divergence, alone.divergence, rtol=TOLERANCE, atol=TOLERANCE)
        assert padded.tokens == alone.tokens and torch.equal(padded.segments, alone.segments)
        assert (padded.original, padded.masked) == (alone.original, alone.masked)
        assert torch.equal(padded.kept_prediction, alone.kept_prediction)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(batch_size: int, classifier: Any, tokenizer: Any) -> None:
    usual = explain(classifier, a_probe(), TEXTS, tokenizer)
    other = explain(classifier, a_probe(), TEXTS, tokenizer, batch_size=batch_size)
    assert other.tokens == usual.tokens and other.masked == usual.masked
    torch.testing.assert_close(other.keep, usual.keep, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(other.divergence, usual.divergence, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_site_at_which_nothing_is_dropped_takes_no_pass_and_changes_nothing(
    masking: str, classifier: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = a_probe(masking)
    for head, bias in zip(probe.heads, (50.0, 50.0, -50.0, -50.0), strict=True):
        head.bias.data.fill_(bias)
    run, resumed = Patched.run, []

    def watched(self: Any, inputs: Any, **asked: Any) -> Any:
        resumed.append("resume" in asked)
        return run(self, inputs, **asked)

    monkeypatch.setattr(Patched, "run", watched)
    result = explain(classifier, probe, TEXTS, tokenizer)
    assert (result.keep[:, :2] > 0.5).all() and (result.keep[:, 2:] < 0.5).all()
    assert resumed == [False, True, True]
    assert (result.divergence[:, :2] == 0).all() and result.kept_prediction[:, :2].all()
    assert (result.divergence[:, 2:] > 0).any(0).all()


def test_attributions_come_in_the_order_of_the_texts(classifier: Any, tokenizer: Any) -> None:
    result = explain(classifier, a_probe(), TEXTS, tokenizer, batch_size=2)
    assert result.tokens == [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in TEXTS]


def test_explaining_twice_gives_the_same_bits_and_draws_nothing(classifier: Any, tokenizer: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (explain(classifier, a_probe(), TEXTS, tokenizer) for _ in range(2))
    assert torch.equal(first.keep, second.keep) and torch.equal(first.divergence, second.divergence)
    torch.manual_seed(1), a_probe()  # the probe's own initial draws
    after_probe = torch.get_rng_state()
    torch.set_rng_state(before)
    probe = a_probe()
    explain(classifier, probe, TEXTS, tokenizer)
    assert torch.equal(torch.get_rng_state(), after_probe)


def snapshot(model: nn.Module) -> list:
    """Everything that is set on a model and its modules."""
    found = []
    for name, module in model.named_modules():
        plain = {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
        hooks = {key: dict(value) for key, value in module.__dict__.items() if "hooks" in key and value is not None}
        found.append((name, type(module), sorted(module.__dict__), plain, hooks))
    return found


@pytest.mark.parametrize("outcome", ["result", "error"])
def test_the_model_is_left_exactly_as_it_was(outcome: str, tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert().train()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad_(False)
    model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    if outcome == "error":
        model.bert.encoder.layer[1].output.dense.weight.data.fill_(torch.nan)
    shape, flags = snapshot(model), [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.clone() for parameter in model.parameters()]
    try:
        explain(model, a_probe(), TEXTS, tokenizer)
        assert outcome == "result"
    except ValueError:
        assert outcome == "error"
    assert snapshot(model) == shape
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.data, weight.data, rtol=0, atol=0, equal_nan=True)


def test_nan_weights_are_one_error_that_names_the_first_broken_site(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert()
    model.bert.encoder.layer[0].output.dense.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the model's state at site 2 \(layer 1\) holds NaN or infinity"):
        explain(model, a_probe(), TEXTS, tokenizer)


def test_a_broken_head_is_one_error_that_names_the_prediction(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert()
    model.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's prediction holds NaN or infinity"):
        explain(model, a_probe(), TEXTS, tokenizer)


def test_one_text_may_be_given_bare(classifier: Any, tokenizer: Any) -> None:
    bare, listed = (
        explain(classifier, a_probe(), TEXTS[1], tokenizer),
        explain(classifier, a_probe(), TEXTS[1:2], tokenizer),
    )
    assert bare.tokens == listed.tokens and torch.equal(bare.keep, listed.keep)


@pytest.mark.parametrize("texts", [None, 3, [3], [("a", "b", "c")]])
def test_texts_of_a_wrong_kind_are_refused(texts: Any, classifier: Any, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="expected a"):
        explain(classifier, a_probe(), texts, tokenizer)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int, classifier: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="batch size"):
        explain(classifier, a_probe(), TEXTS, tokenizer, batch_size=batch_size)


def test_no_examples_are_refused(classifier: Any) -> None:
    with pytest.raises(ValueError, match="texts is empty"):
        explain(classifier, a_probe(), Examples([], [], [], lambda i, a: ""))


def test_texts_without_a_tokenizer_are_refused(classifier: Any) -> None:
    with pytest.raises(TypeError, match="tokenizer is missing"):
        explain(classifier, a_probe(), TEXTS)


def test_a_probe_of_a_deeper_model_is_refused(classifier: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the probe has 6 sites and the model 4"):
        explain(classifier, a_probe(sites=6), TEXTS, tokenizer)


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_probe_of_a_wider_model_is_refused(masking: str, classifier: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"the state at site \d is 16 wide; this probe was made for 24"):
        explain(classifier, a_probe(masking, width=24), TEXTS, tokenizer)


def test_keep_never_rises_with_depth_for_input_masking(classifier: Any, tokenizer: Any) -> None:
    keep = explain(classifier, a_probe(), TEXTS, tokenizer).keep
    assert (keep[:, 1:] <= keep[:, :-1]).all()
    assert (keep[:, -1] < keep[:, 0]).all()  # and it does fall


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_where_everything_is_kept_the_prediction_stays(masking: str, reader: Any, tokenizer: Any) -> None:
    probe = a_probe(masking)
    for head in probe.heads:
        head.bias.data.fill_(50.0)
    result = explain(reader, probe, PAIRS, tokenizer)
    assert (result.keep > 0.5).all()
    assert result.kept_prediction.all()
    assert (result.divergence <= TOLERANCE).all()
    assert all(set(masked) == {original} for masked, original in zip(result.masked, result.original, strict=True))


def test_where_everything_is_dropped_all_texts_of_a_length_look_alike(classifier: Any, tokenizer: Any) -> None:
    probe = a_probe()
    for head in probe.heads:
        head.bias.data.fill_(-50.0)
    texts = ["a fine film", "the old king"]
    result = explain(classifier, probe, texts, tokenizer)
    assert (result.keep < 0.5).all()
    assert result.masked[0] == result.masked[1]
    assert (result.divergence[1] > 100 * TOLERANCE).all()  # and that is not what the model said of the whole text


def test_a_span_is_looked_for_in_the_passage(reader: Any, tokenizer: Any) -> None:
    for (question, passage), original in zip(PAIRS, explain(reader, a_probe(), PAIRS, tokenizer).original, strict=True):
        assert original and original in passage, question


def test_the_divergence_is_between_the_original_and_the_thresholded_prediction(classifier: Any, tokenizer: Any) -> None:
    probe = a_probe("hidden")
    result = explain(classifier, probe, TEXTS[1:2], tokenizer)[0]
    examples = encode(tokenizer, TEXTS[1:2], classifier)
    inputs = examples.collate([examples[0]])
    layers = classifier.bert.encoder.layer
    with torch.no_grad():
        original = classifier(**inputs).logits.log_softmax(-1)
        for site, layer in ((1, layers[0]), (2, layers[1])):
            kept = (result.keep[:, site] > 0.5)[None, :, None]
            hook = layer.register_forward_pre_hook(
                lambda _, args, kept=kept, site=site: (
                    torch.where(kept, args[0], probe.baselines[site]),
                    *args[1:],
                )
            )
            masked = classifier(**inputs).logits.log_softmax(-1)
            hook.remove()
            expected = (original.exp() * (original - masked)).sum()
            assert abs(result.divergence[site] - expected) <= TOLERANCE * max(1.0, expected.item())


def test_a_model_that_registered_its_own_sites_is_explained() -> None:
    torch.manual_seed(0)
    examples, probe = toy_examples(20, 0), Probe([64, 2], "hidden")
    result = explain(ToyModel(), probe, examples, meta={"seed": 0})
    assert result.site_names == ("embedding", "hidden")
    assert result.tokens == examples.tokens
    assert result.meta == {"seed": 0} and result.masking == "hidden"
