from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from diffmask_fast.data import encode
from diffmask_fast.gru import GRUClassifier, gru_on
from diffmask_fast.models import load_for
from diffmask_fast.sites import patch, sites_of

NAMES = {0: "bad", 1: "so-so", 2: "good"}
TEXTS = ["a fine film", "the old king walked in münchen .", "dull"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def model(tiny_bert: Any) -> GRUClassifier:
    encoder = tiny_bert()
    torch.manual_seed(1)
    return gru_on(encoder, NAMES).eval()


@pytest.fixture
def inputs(model: GRUClassifier, tokenizer: Any) -> dict[str, torch.Tensor]:
    examples = encode(tokenizer, TEXTS, model)
    return examples.collate(examples.inputs)


def test_the_word_embeddings_are_the_encoders_and_frozen(model: GRUClassifier, tiny_bert: Any) -> None:
    assert torch.equal(model.embedding.weight, tiny_bert().get_input_embeddings().weight)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"embedding.weight"}
    assert model.gru.hidden_size == model.gru.input_size == 16 and model.output.out_features == 3


def test_the_embedding_is_a_copy(tiny_bert: Any) -> None:
    encoder = tiny_bert()
    model = gru_on(encoder, NAMES)
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert encoder.get_input_embeddings().weight.abs().sum() > 0


def test_the_logits_are_those_of_a_cell_run_by_hand_over_the_real_tokens(
    model: GRUClassifier, inputs: dict[str, torch.Tensor]
) -> None:
    got = model(**inputs).logits
    cell = torch.nn.GRUCell(16, 16)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.gru.state_dict().items()})
    for row, (ids, real) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        state = torch.zeros(16)
        for word in ids[: real.sum()]:
            state = cell(model.embedding.weight[word], state)
        # some ten steps, each of sums of 16 + 16 terms of size 1, and the output's 16
        torch.testing.assert_close(got[row], model.output(state), rtol=0, atol=(10 * 32 + 16) * EPS)


def test_what_stands_in_the_padding_changes_nothing(model: GRUClassifier, inputs: dict[str, torch.Tensor]) -> None:
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 7)}
    assert torch.equal(model(**inputs).logits, model(**other).logits)


def test_the_loss_is_the_cross_entropy(model: GRUClassifier, inputs: dict[str, torch.Tensor]) -> None:
    output = model(**inputs, labels=torch.tensor([2, 0, 1]))
    chances = output.logits.softmax(-1)
    by_hand = -(chances[0, 2].log() + chances[1, 0].log() + chances[2, 1].log()) / 3
    torch.testing.assert_close(output.loss, by_hand, rtol=4 * EPS, atol=0)


def test_the_sites_are_the_embeddings_and_the_grus_states_and_a_run_can_resume_at_both(
    model: GRUClassifier, inputs: dict[str, torch.Tensor]
) -> None:
    assert [site.name for site in sites_of(model)] == ["embedding", "gru"]
    with torch.no_grad(), patch(model) as patched:
        output, states = patched.run(inputs, capture=(0, 1))
        assert torch.equal(states[0], model.embedding(inputs["input_ids"]))
        assert torch.equal(states[1], model.gru(states[0])[0])
        for site, state in states.items():
            assert torch.equal(patched.run(inputs, resume=(site, state)).output.logits, output.logits)
            changed = patched.run(inputs, resume=(site, state.flip(0))).output.logits
            assert not torch.equal(changed, output.logits)


def test_a_saved_one_is_loaded_as_any_model(model: GRUClassifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = load_for(str(tmp_path))
    assert type(loaded) is GRUClassifier and not loaded.training and loaded.config.id2label == NAMES
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
