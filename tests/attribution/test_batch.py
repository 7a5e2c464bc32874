from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffmask_fast.attribution.batch import read_batch
from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.sites import patch


@pytest.fixture
def model(tiny_bert: Any) -> Any:
    return tiny_bert()


@pytest.fixture
def examples() -> Examples:
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [ids[0], ids[1][:4]]
    return Examples(
        [{"input_ids": row} for row in rows],
        [[str(token) for token in row] for row in rows],
        [[1] * len(row) for row in rows],
        lambda i, answer: str(answer[0]),
    )


@torch.no_grad()
def test_open_gates_leave_the_prediction_to_the_bit(model: Any, examples: Examples) -> None:
    with patch(model) as patched:
        batch = read_batch(patched, examples, [0, 1], range(4), torch.device("cpu"))
        for site in range(4):
            masked = batch.predict(site, batch.mixed(site, torch.ones(2, 6), torch.ones(16)))
            assert torch.equal(masked.output.logits, batch.original.output.logits)
            assert torch.equal(batch.divergence(masked), torch.zeros(2))


@torch.no_grad()
def test_a_closed_gate_puts_the_baseline_in_the_states_place(model: Any, examples: Examples) -> None:
    gates = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.float32)
    baseline = torch.randn(16, generator=torch.Generator().manual_seed(1))
    with patch(model) as patched:
        batch = read_batch(patched, examples, [0, 1], range(4), torch.device("cpu"))
        for site in range(4):
            replaced = torch.where(gates[..., None] == 1, batch.states[site], baseline)
            expected = patched.run(batch.inputs, replace={site: replaced}).output
            masked = batch.predict(site, batch.mixed(site, gates, baseline))
            assert torch.equal(masked.output.logits, expected.logits)


@torch.no_grad()
def test_a_text_may_have_several_rows(model: Any, examples: Examples) -> None:
    rows = torch.tensor([1, 0, 1])
    gates = torch.tensor([[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], dtype=torch.float32)
    with patch(model) as patched:
        batch = read_batch(patched, examples, [0, 1], [0], torch.device("cpu"))
        several = batch.predict(0, batch.mixed(0, gates, torch.zeros(16), rows), rows)
        for place, row in enumerate(rows.tolist()):
            alone = read_batch(patched, examples, [row], [0], torch.device("cpu"))
            length = len(examples.tokens[row])
            one = alone.predict(0, alone.mixed(0, gates[place : place + 1, :length], torch.zeros(16)))
            # two layers of some ten sums each of at most 32 terms, on values near one
            torch.testing.assert_close(several.tables[0][place], one.tables[0][0], rtol=0, atol=1e-5)
            assert batch.keeps(several, rows)[place] == alone.keeps(one)[0]


def test_gradients_reach_the_gates_and_the_baseline(model: Any, examples: Examples) -> None:
    gates = torch.full((2, 6), 0.5, requires_grad=True)
    baseline = torch.zeros(16, requires_grad=True)
    with frozen(model), patch(model) as patched:
        with torch.no_grad():
            batch = read_batch(patched, examples, [0, 1], [0], torch.device("cpu"))
        masked = batch.predict(0, batch.mixed(0, gates, baseline))
        masked.output.logits[:, 0].sum().backward()
    assert gates.grad is not None and (gates.grad[batch.real == 1] != 0).all()
    assert baseline.grad is not None and (baseline.grad != 0).any()


@torch.no_grad()
def test_rows_of_short_texts_may_do_without_the_padding_of_long_ones(model: Any, examples: Examples) -> None:
    rows = torch.tensor([1, 1])
    gates = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.float32)
    labelled = replace(examples, inputs=[item | {"labels": 1} for item in examples.inputs], fixed=frozenset({"labels"}))
    with patch(model) as patched:
        batch = read_batch(patched, labelled, [0, 1], [0], torch.device("cpu"))
        padded = torch.nn.functional.pad(gates, (0, 2))
        whole = batch.predict(0, batch.mixed(0, padded, torch.zeros(16), rows), rows)
        cut = batch.predict(0, batch.mixed(0, gates, torch.zeros(16), rows), rows)
    # the same sums, but for zeros at their ends, in another order
    torch.testing.assert_close(cut.output.logits, whole.output.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.divergence(cut, rows), batch.divergence(whole, rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cut_span_is_compared_with_the_original_one(tiny_bert: Any, examples: Examples) -> None:
    passage = replace(examples, segments=[[0] + [2] * (len(row) - 1) for row in examples.segments])
    rows = torch.tensor([1, 1])
    with patch(tiny_bert("ForQuestionAnswering")) as patched:
        batch = read_batch(patched, passage, [0, 1], [0], torch.device("cpu"))
        cut = batch.predict(0, batch.mixed(0, torch.ones(2, 4), torch.zeros(16), rows), rows)
    assert cut.tables[0].shape == (2, 4)
    assert torch.equal(batch.kind.answers(cut.tables, batch.allowed[rows, :4]), batch.answers[rows])
    assert batch.keeps(cut, rows).all()
    torch.testing.assert_close(batch.divergence(cut, rows), torch.zeros(2), rtol=0, atol=1e-5)
    assert batch.special.tolist() == [[True] + [False] * 5] * 2
