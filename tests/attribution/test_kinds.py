"""Every kind of prediction through the whole line: trained on, remembered, explained by a probe and by each method."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_probe import TOLERANCE, a_probe

from diffmask_fast.analysis.faithfulness import faithfulness
from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.explain import explain
from diffmask_fast.attribution.methods import METHODS
from diffmask_fast.data import Examples, TooLongError, encode
from diffmask_fast.images import encode_images, whole_picture
from diffmask_fast.masking import frozen
from diffmask_fast.predictions import AtPositions, Binary, Classes, Own, Values
from diffmask_fast.sites import patch
from diffmask_fast.training.evaluation import sampled_metrics
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.trainer import fresh_probe, train_probe

transformers = pytest.importorskip("transformers")

TEXTS = ["a fine [MASK] film", "the old king [MASK] in the river [MASK]", "[MASK] dull"]
LONG = [" ".join(["the old king in the [MASK] city , a fine film of the year ."] * 4), "a dull [MASK]"]
HEADS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "token classification": ("ForTokenClassification", {"num_labels": 3}, None),
    "masked words": ("ForMaskedLM", {}, None),
    "next word": ("LMHeadModel", {"is_decoder": True}, None),
    "regression": ("ForSequenceClassification", {"num_labels": 2, "problem_type": "regression"}, None),
    "labels": ("ForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}, None),
    "yes or no": ("ForSequenceClassification", {"num_labels": 1}, Binary()),
    "own": ("ForSequenceClassification", {"num_labels": 3}, Own(lambda p, q: (p - q).square().sum(-1))),
}
QUICK = Recipe(epochs=2, batch_size=2, tolerance=0.1)


@pytest.fixture(params=HEADS)
def asked(request: pytest.FixtureRequest, tiny_bert: Any) -> tuple[Any, Any]:
    """A model and the kind to encode texts with, None for what the model was made for."""
    head, settings, kind = HEADS[request.param]
    return tiny_bert(head, **settings), kind


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_text_is_explained_alike_alone_and_padded_in_a_batch(masking: str, asked: Any, tokenizer: Any) -> None:
    model, kind = asked
    probe = a_probe(masking)
    together = explain(model, probe, encode(tokenizer, TEXTS, model, kind=kind))
    for i, text in enumerate(TEXTS):
        alone, padded = explain(model, probe, encode(tokenizer, [text], model, kind=kind))[0], together[i]
        # a token at the threshold could go either way: the comparison must not rest on one
        assert ((alone.keep - 0.5).abs() > TOLERANCE).all()
        torch.testing.assert_close(padded.keep, alone.keep, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(padded.divergence, alone.divergence, rtol=10 * TOLERANCE, atol=TOLERANCE)
        assert (padded.original, padded.masked) == (alone.original, alone.masked)
        assert torch.equal(padded.kept_prediction, alone.kept_prediction)
        assert (padded.divergence > 0).any()


def test_what_is_predicted_is_said_in_words(tiny_bert: Any, tokenizer: Any) -> None:
    def said(name: str) -> str:
        head, settings, kind = HEADS[name]
        model = tiny_bert(head, **settings)
        return explain(model, a_probe(), encode(tokenizer, TEXTS[1:2], model, kind=kind))[0].original

    def logits(name: str) -> torch.Tensor:
        head, settings, _ = HEADS[name]
        with torch.no_grad():
            return tiny_bert(head, **settings)(**tokenizer(TEXTS[1:2], return_tensors="pt")).logits[0]

    masks = [i for i, token in enumerate(tokenizer(TEXTS[1])["input_ids"]) if token == tokenizer.mask_token_id]
    assert len(masks) == 2
    words = [repr(tokenizer.decode([token])) for token in logits("masked words").argmax(-1)[masks].tolist()]
    assert said("masked words") == " ".join(words)
    assert said("next word") == repr(tokenizer.decode([int(logits("next word")[-1].argmax())]))
    labels = [f"LABEL_{i}" for i in logits("token classification").argmax(-1).tolist()]
    assert said("token classification").split() == labels
    assert said("regression") == ", ".join(f"{value:.4g}" for value in logits("regression").tolist())
    there = [f"LABEL_{i}" for i, value in enumerate(logits("labels").tolist()) if value > 0]
    assert said("labels") == (", ".join(there) or "(none)")


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_probe_is_trained_and_measured(masking: str, asked: Any, tokenizer: Any, tmp_path: Path) -> None:
    model, kind = asked
    examples = encode(tokenizer, TEXTS, model, kind=kind)
    probe = fresh_probe(model, examples, QUICK, masking, width=8)
    before = [parameter.clone() for parameter in probe.parameters()]
    objective = train_probe(model, probe, examples, QUICK, tmp_path, quiet=True)
    assert objective.remembered is None or objective.remembered.get([0, 1, 2]) is not None
    assert (objective.remembered is None) == isinstance(kind, Own)
    moved = [not torch.equal(old, new) for old, new in zip(before, probe.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2 and all(parameter.isfinite().all() for parameter in probe.parameters())
    rows = sampled_metrics(model, probe, examples)
    assert len(rows) == 4 and all(row["sampled_kl"] >= -TOLERANCE for row in rows)


def test_what_is_remembered_changes_no_bit(asked: Any, tokenizer: Any, tmp_path: Path) -> None:
    model, kind = asked
    examples = encode(tokenizer, TEXTS, model, kind=kind)
    found = []
    for run in range(2):  # the second finds everything remembered
        torch.manual_seed(0)
        probe = fresh_probe(model, examples, QUICK, "input", width=8)
        options = {"predictions": tmp_path / "shared", "quiet": True}
        train_probe(model, probe, examples, QUICK, tmp_path / str(run), **options)
        found.append(torch.cat([parameter.detach().reshape(-1) for parameter in probe.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_it(method: str, asked: Any, tokenizer: Any) -> None:
    model, kind = asked
    learns = {"schulz", "guan", "diffmask-per-example", "reinforce"}
    options: dict[str, Any] = {"steps": 10} if method in learns else {}
    examples = encode(tokenizer, TEXTS, model, kind=kind)
    if isinstance(kind, Own) and method in ("integrated-gradients", "leave-one-out"):
        with pytest.raises(ValueError, match="gives its answers no probability"):
            attribute(model, examples, method=method)
        return
    found = attribute(model, examples, method=method, sites=["layer 1"], **options)
    assert len(found) == 3
    # erasure may find that nothing is needed: then the prediction stays without any state
    assert (found.keep > 0).any() or (method == "erasure" and found.kept_prediction.all())


@pytest.mark.parametrize("name", ["token classification", "masked words", "regression", "labels", "own"])
def test_a_long_text_has_one_answer_from_its_windows(name: str, tiny_bert: Any, tokenizer: Any) -> None:
    head, settings, kind = HEADS[name]
    model = tiny_bert(head, **settings)
    examples = encode(tokenizer, LONG, model, 6, kind)
    assert examples.windows is not None and len(examples) > len(LONG) + 1
    probe = a_probe()
    for one in probe.heads:
        one.bias.data.fill_(50.0)
    result = explain(model, probe, examples)
    assert result.kept_prediction.all() and (result.divergence <= TOLERANCE).all()
    ids = tokenizer(LONG[0], verbose=False)["input_ids"]
    assert len(result[0].tokens) == len(ids)
    if name == "token classification":
        assert len(result[0].original.split()) == len(ids)
    if name == "masked words":
        assert len(result[0].original.split()) == ids.count(tokenizer.mask_token_id) == 4


def test_what_is_said_at_a_place_is_said_by_the_window_with_most_around_it(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert("ForTokenClassification", num_labels=3)
    examples = encode(tokenizer, LONG[:1], model, 6)
    alone = [
        explain(model, a_probe(), replace(examples.select([i]), windows=None))[0].original.split()
        for i in range(len(examples))
    ]
    merged = explain(model, a_probe(), examples)[0].original.split()
    assert examples.windows is not None
    for token, label in enumerate(merged):
        best, chosen = -1, alone[0]
        for window, labels in zip(examples.windows, alone, strict=True):
            around = min(token - window.piece.start, window.piece.stop - 1 - token)
            if around > best:
                best, chosen = around, labels
                at = window.positions.index(token)
        if best < 0:  # stands in every window
            at = examples.windows[0].positions.index(token)
        assert label == chosen[at]


def test_texts_without_a_place_are_refused(tiny_bert: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="text 1 has nowhere the token 4: put it there, or leave the text out"):
        encode(tokenizer, ["a [MASK] film", "a fine film"], tiny_bert("ForMaskedLM"))
    nowhere = AtPositions(lambda inputs: inputs["input_ids"] < 0)
    with pytest.raises(ValueError, match="text 0 has nowhere a place at which the model is asked"):
        encode(tokenizer, ["a fine film"], tiny_bert("ForTokenClassification"), kind=nowhere)


def test_a_prompt_that_the_model_does_not_take_whole_is_refused(tiny_bert: Any, tokenizer: Any) -> None:
    with pytest.raises(TooLongError, match=r"text 0 has \d+ tokens, more than the model takes.*give the end of it"):
        encode(tokenizer, LONG, tiny_bert("LMHeadModel", is_decoder=True))


def test_windows_without_a_place_say_nothing(tiny_bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Neither for the divergence of the text, nor for how faithful a method is, nor for what a probe learns."""
    model = tiny_bert("ForMaskedLM")
    text = "a [MASK] film " + LONG[0].replace("[MASK]", "old")
    examples = encode(tokenizer, [text], model, 6)
    places = [item["input_ids"].count(tokenizer.mask_token_id) for item in examples.inputs]
    assert places[0] == 1 and sum(places) == 1 and len(places) > 2
    probe = a_probe("hidden")
    alone = explain(model, probe, replace(examples.select([0]), windows=None))
    whole = explain(model, probe, examples)
    torch.testing.assert_close(whole.divergence, alone.divergence, rtol=TOLERANCE, atol=TOLERANCE)
    metrics, first = (sampled_metrics(model, probe, one) for one in (examples, examples.select([0])))
    assert [row["sampled_open"] <= 1 for row in metrics] == [True] * 4 and len(metrics) == len(first)
    closed = faithfulness(model, examples, [whole], shares=(0.0, 1.0))
    assert closed.lines[0].kept_prediction[-1] in (0.0, 1.0)  # of one prediction and not of several windows
    with frozen(model), patch(model) as patched:
        fresh = fresh_probe(model, examples, QUICK, "hidden", width=8)
        objective = Objective(patched, fresh, QUICK, kind=examples.kind)
        loss = objective(**examples.collate([examples[1], examples[2]]))["loss"]
        loss.backward()
        assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in fresh.parameters())
        objective(**examples.collate([examples[0], examples[1]]))["loss"].backward()
        assert any(p.grad is not None and p.grad.any() for p in fresh.parameters())


def test_a_regression_without_a_kind_is_refused_at_every_door(tiny_bert: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_bert(num_labels=1, problem_type="regression")
    examples = replace(encode(tokenizer, TEXTS, model), kind=None)
    for call in (
        lambda: explain(model, a_probe(), examples),
        lambda: attribute(model, examples, method="leave-one-out"),
        lambda: train_probe(model, a_probe(), examples, QUICK, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"problem_type is 'regression'.*Values\(\)"):
            call()


def test_the_scale_of_a_regression_is_that_of_its_divergence(tiny_bert: Any, tokenizer: Any) -> None:
    model = tiny_bert(num_labels=1, problem_type="regression")
    once, tenth = (
        explain(model, a_probe("hidden"), encode(tokenizer, TEXTS, model, kind=Values(scale))).divergence
        for scale in (1.0, 0.1)
    )
    torch.testing.assert_close(tenth, 100 * once, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=24,
        patch_size=8,
        num_labels=3,
        initializer_range=0.4,
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def pictures(vit: Any) -> Examples:
    return encode_images(torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)), vit)


def test_a_picture_has_a_token_for_each_patch(pictures: Examples) -> None:
    assert pictures.tokens[0] == ["[CLS]", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2", "2,0", "2,1", "2,2"]
    assert pictures.segments[0] == [0] + [1] * 9


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_pictures_are_trained_on_and_explained(masking: str, vit: Any, pictures: Examples, tmp_path: Path) -> None:
    probe = fresh_probe(vit, pictures, QUICK, masking, width=8)
    train_probe(vit, probe, pictures, QUICK, tmp_path, quiet=True)
    result = explain(vit, a_probe(masking, sites=3), pictures)
    assert result.site_names == ("layer 0", "layer 1", "last") and (result.divergence > 0).any()
    with torch.no_grad():
        labels = vit(torch.stack([item["pixel_values"] for item in pictures.inputs])).logits.argmax(-1)
    assert result.original == [f"LABEL_{label}" for label in labels.tolist()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_pictures(method: str, vit: Any, pictures: Examples) -> None:
    learns = {"schulz", "guan", "diffmask-per-example", "reinforce"}
    options: dict[str, Any] = {"steps": 10} if method in learns else {}
    found = attribute(vit, pictures, method=method, sites=["layer 1"], **options)
    assert len(found) == 4 and (found.keep > 0).any()


@pytest.mark.parametrize(
    ("pixels", "error", "words"),
    [
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), TypeError, "expected a float tensor, got torch.uint8"),
        ([[0.0]], TypeError, "expected a float tensor, got list"),
        (torch.zeros(3, 24, 24), ValueError, r"the shape \(3, 24, 24\)"),
        (torch.zeros(0, 3, 24, 24), ValueError, r"the shape \(0, 3, 24, 24\)"),
        (torch.full((1, 3, 24, 24), torch.nan), ValueError, "neither NaN nor infinity"),
    ],
)
def test_what_is_no_picture_is_refused(pixels: Any, error: type[Exception], words: str, vit: Any) -> None:
    with pytest.raises(error, match=words):
        encode_images(pixels, vit)


def test_a_model_that_sees_nothing_is_refused(classifier: Any) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification reads no pictures"):
        encode_images(torch.zeros(1, 3, 24, 24), classifier)


def test_a_kind_that_somebody_else_wrote_is_not_remembered(classifier: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Two of them may look alike and read other things."""

    class Warm(Classes):
        pass

    texts = ["a fine film", "dull"]
    for kind, remembered in ((Warm(), False), (Classes(), True)):
        examples = encode(tokenizer, texts, classifier, kind=kind)
        probe = fresh_probe(classifier, examples, QUICK, "input", width=8)
        objective = train_probe(classifier, probe, examples, QUICK, tmp_path / str(remembered), quiet=True)
        assert (objective.remembered is not None) == remembered


def test_pictures_in_sixteen_bits_are_explained(vit: Any, pictures: Examples) -> None:
    half = copy.deepcopy(vit).bfloat16()
    pixels = torch.stack([item["pixel_values"] for item in pictures.inputs]).bfloat16()
    found = attribute(half, encode_images(pixels, half), method="schulz", sites=["layer 1"], steps=3)
    assert len(found) == 4


def test_tokens_of_the_whole_picture_are_named() -> None:
    config = transformers.ViTConfig()
    assert whole_picture(config, 1) == ["[CLS]"] and whole_picture(config, 0) == []
    assert whole_picture(transformers.DeiTConfig(), 2) == ["[CLS]", "[DIST]"]
    config.num_register_tokens = 2
    assert whole_picture(config, 3) == ["[CLS]", "[REG0]", "[REG1]"]


def test_a_model_whose_sites_have_other_tokens_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model = transformers.SwinForImageClassification(config).eval()
    with pytest.raises(ValueError, match="expected one row of tokens at all sites"):
        encode_images(torch.zeros(1, 3, 16, 16), model)
