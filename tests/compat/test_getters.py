"""Getters and setters: the published states, replaced as published, for models of today's transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmask_fast.compat.diffmask import (
    bert_getter,
    bert_setter,
    gru_getter,
    gru_setter,
    toy_getter,
    toy_setter,
)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def alike(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_bert_states_are_the_word_embedding_and_the_model_s_own_hidden_states(tiny_bert: Any, inputs: Any) -> None:
    model = tiny_bert()
    outputs, states = bert_getter(model, inputs)
    plain = model(**inputs, output_hidden_states=True)
    assert isinstance(states, tuple) and torch.equal(outputs[0], plain.logits)
    assert alike(states, (model.bert.embeddings.word_embeddings(inputs["input_ids"]), *plain.hidden_states))


def test_outputs_unpack_as_tuples_and_keep_their_names(tiny_bert: Any, inputs: Any) -> None:
    """Unpacking what transformers returns since version 4 gives the published code the names instead."""
    (logits,), _ = bert_getter(tiny_bert(), inputs)
    outputs, states = bert_getter(tiny_bert("ForQuestionAnswering"), inputs)
    start, end = outputs
    assert logits.shape == (2, 2) and len(states) == 4
    assert start is outputs.start_logits is outputs["start_logits"] and end is outputs[1] is outputs[-1]
    with pytest.raises(AttributeError):
        _ = outputs.nothing
    assert isinstance(bert_getter(tiny_bert(), inputs | {"return_dict": False})[0], tuple)


def test_each_state_can_be_replaced_and_gets_the_gradient(tiny_bert: Any, inputs: Any) -> None:
    model = tiny_bert()
    (original,), states = bert_getter(model, inputs)
    for k in range(len(states)):
        new = (states[k] * 0.5).detach().requires_grad_()
        given: list[Any] = [None] * len(states)
        given[k] = new
        (logits,), seen = bert_setter(model, inputs, given)
        assert seen[k] is new and alike(seen[:k], states[:k]) and not torch.equal(logits, original)
        assert torch.autograd.grad(logits.sum(), new)[0].abs().sum() > 0
    assert torch.equal(bert_setter(model, inputs, [None] * len(states))[0][0], original)
    assert torch.equal(bert_setter(model, inputs, states)[0][0], original)


def test_a_forward_function_is_called_in_place_of_the_model(tiny_bert: Any, inputs: Any) -> None:
    model = tiny_bert()

    def forward(input_ids: Tensor, mask: Tensor, labels: Any = None) -> Any:
        return model(input_ids=input_ids, attention_mask=mask)

    given = {"input_ids": inputs["input_ids"], "mask": inputs["attention_mask"]}
    (logits,), states = bert_getter(model, given, forward)
    (want,), want_states = bert_getter(model, inputs)
    assert torch.equal(logits, want) and alike(states, want_states)
    new = [torch.zeros_like(states[0]), None, None, None]
    assert torch.equal(bert_setter(model, given, new, forward)[0][0], bert_setter(model, inputs, new)[0][0])


class Recurrent(nn.Module):
    """As the published recurrent classifier: an embedding `emb`, a GRU over packed states."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 6)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.classifier = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, mask: Tensor, labels: Any = None) -> tuple[Tensor]:
        lengths = mask.sum(-1)
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(input_ids), lengths, True, enforce_sorted=False)
        return (self.classifier(self.gru(packed)[1][0]),)


def test_a_recurrent_model_has_its_embedding(inputs: Any) -> None:
    model = Recurrent()
    given = {"input_ids": inputs["input_ids"] % 20, "mask": inputs["attention_mask"]}
    (logits,), (state,) = gru_getter(model, given)
    assert torch.equal(state, model.emb(given["input_ids"])) and torch.equal(logits, model(**given)[0])
    (left,), (same,) = gru_setter(model, given, [None])
    assert torch.equal(left, logits) and torch.equal(same, state)
    (changed,), (new,) = gru_setter(model, given, [state * 0])
    assert new.eq(0).all() and not torch.equal(changed, logits)


class Toy(nn.Module):
    """As the published model of the toy task."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_query = nn.Embedding(10, 4)
        self.embedding_input = nn.Embedding(10, 4)
        self.encoder = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2))
        self.head = nn.Linear(2, 1)

    def forward(self, query_ids: Tensor, input_ids: Tensor, mask: Tensor, labels: Any = None) -> Tensor:
        query, x = self.embedding_query(query_ids), self.embedding_input(input_ids)
        both = torch.cat((query.flatten(-2).unsqueeze(-2).expand(-1, x.shape[-2], -1), x), -1)
        return self.head((self.encoder(both) * mask.unsqueeze(-1)).sum(1)).squeeze(-1)


def test_the_toy_model_has_query_input_and_encoder() -> None:
    model = Toy()
    inputs = {"query_ids": torch.tensor([[1, 2]]), "input_ids": torch.tensor([[3, 1, 1]]), "mask": torch.ones(1, 3)}
    logits, states = toy_getter(model, inputs)
    assert [tuple(state.shape) for state in states] == [(1, 2, 4), (1, 3, 4), (1, 3, 2)]
    assert torch.equal(logits, model(**inputs))
    for k in range(3):
        given: list[Any] = [None] * 3
        given[k] = states[k] + 1
        changed, nothing = toy_setter(model, inputs, given)
        assert nothing is None and not torch.equal(changed, logits)
    assert torch.equal(toy_setter(model, inputs, [None] * 3)[0], logits)


def test_hooks_are_gone_also_after_an_error() -> None:
    """The published toy functions leave theirs on the model when it raises."""
    model = Toy()
    with pytest.raises(IndexError):
        toy_getter(model, {"query_ids": torch.tensor([[1, 99]]), "input_ids": torch.zeros(1, 3), "mask": None})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_another_number_of_states_is_refused(tiny_bert: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match="3 entries and BertForSequenceClassification 4 states"):
        bert_setter(tiny_bert(), inputs, [None] * 3)


def test_a_state_of_another_width_is_refused(tiny_bert: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"site 2 is \(2, 7, 15\)"):
        bert_setter(tiny_bert(), inputs, [None, None, torch.zeros(2, 7, 15), None])


def test_a_model_without_these_modules_is_refused(tiny_bert: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match="no 'emb'"):
        gru_getter(tiny_bert(), inputs)
