from __future__ import annotations

from typing import Any

import pytest
import torch

from diffmask_fast.training.backbone import EAGER_UP_TO, running_in


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was_to_the_last_bit(tiny_bert: Any, fails: bool) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation="sdpa")
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    plain = model(**inputs).logits
    try:
        with running_in(model, torch.bfloat16, 3):
            assert all(p.dtype == torch.bfloat16 for p in model.parameters())
            rounded = model(**inputs).logits
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert rounded.dtype == torch.bfloat16
    # weights and every layer's result are rounded to 8 bits; logits of a tiny random model are well below 1
    assert 0 < (rounded.float() - plain).abs().max() < 0.05
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1], name
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("dtype", "longest", "own", "expected"),
    [
        (torch.bfloat16, EAGER_UP_TO, "sdpa", "eager"),
        (torch.bfloat16, EAGER_UP_TO + 1, "sdpa", "sdpa"),
        (torch.bfloat16, 3, "eager", "eager"),
        (None, 3, "sdpa", "sdpa"),
    ],
)
def test_attention_by_plain_products_where_it_is_faster(
    tiny_bert: Any, dtype: Any, longest: int, own: str, expected: str
) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation=own)
    with running_in(model, dtype, longest):
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == own


def test_without_a_dtype_nothing_changes(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification")
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with running_in(model, None, 3):
        assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_model_without_a_configuration_runs_too() -> None:
    model = torch.nn.Linear(3, 2)
    with running_in(model, torch.bfloat16, 3):
        assert model(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
