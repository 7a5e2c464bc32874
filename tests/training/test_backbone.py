from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffmask_fast.masking import frozen
from diffmask_fast.sites import patch
from diffmask_fast.training.backbone import PRODUCTS, PRODUCTS_UP_TO, attention_by_products, compiled, running_in


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
        (torch.bfloat16, PRODUCTS_UP_TO, "sdpa", PRODUCTS),
        (torch.bfloat16, PRODUCTS_UP_TO + 1, "sdpa", "sdpa"),
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


@pytest.mark.slow
def test_compiled_layers_give_the_plain_states_whatever_is_captured_and_make_no_graph_for_each_site(
    tiny_bert: Any,
) -> None:
    model = tiny_bert("ForSequenceClassification")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with frozen(model), patch(model) as patched:
        plain = patched.run(inputs, capture=range(4))
        with compiled(patched.layers):
            graphs = []
            for site in (0, 3, 1, 2):
                for gradients in (False, True):
                    with torch.set_grad_enabled(gradients):
                        state = plain.states[site].clone().requires_grad_(gradients)
                        stopped = patched.run(inputs, capture=range(site + 1), stop=site).states
                        output = patched.run(inputs, resume=(site, state)).output
                    # float32 sums in another order: two layers, 16 wide, values of size 1
                    torch.testing.assert_close(output.logits, plain.output.logits, rtol=0, atol=1e-5)
                    torch.testing.assert_close(stopped[site], plain.states[site], rtol=0, atol=1e-5)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        assert 1 <= graphs[-1] <= 4  # with and without gradients, and whether a state needs one
        after = patched.run(inputs, capture=range(4))
    assert torch.equal(after.output.logits, plain.output.logits)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_by_products_is_that_of_sdpa(mask: str, heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, heads, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None].expand(2, 1, 5, 5)
    given = {"bool": real, "added": torch.zeros(2, 1, 5, 5).double().masked_fill(~real, -1e9)}.get(mask)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = mask == "causal", 4 // heads
    grad = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    results = []
    for attend in (attention_by_products, sdpa_attention_forward):
        out, _ = attend(module, query, key, value, given, scaling=0.3)
        results.append((out, *torch.autograd.grad(out, (query, key, value), grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_masked_by_products_a_padded_text_has_the_states_of_the_text_alone(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation="sdpa")
    alone = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in alone.items()}
    with running_in(model, torch.bfloat16, 5), torch.no_grad():
        one, other = model(**alone).logits, model(**padded).logits
    # the same products of 8-bit mantissas, perhaps in another order
    torch.testing.assert_close(one, other, rtol=0, atol=0.02)
