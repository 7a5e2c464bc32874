"""ModernBERT: rotary positions, local and global attention, a norm behind the last layer."""

from __future__ import annotations

import pytest
import torch

from diffmask_fast.sites import patch, sites_of

LAYERS = 3


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=64, local_attention=4, initializer_range=0.5, attn_implementation=request.param,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, reference_compile=False,
    )  # fmt: skip
    return transformers.ModernBertForQuestionAnswering(config).eval()


@pytest.fixture
def texts(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def test_the_sites_are_the_word_embedding_each_layers_input_and_the_last_layers_output(model):
    assert [str(site) for site in sites_of(model)] == [
        "embedding: output 0 of model.embeddings.tok_embeddings",
        "layer 0: input 0 of model.layers.0",
        "layer 1: input 0 of model.layers.1",
        "layer 2: input 0 of model.layers.2",
        "last: output 0 of model.layers.2",
    ]


def test_captured_states_are_those_of_the_plain_model(model, texts):
    real = texts["attention_mask"].bool()
    hidden = model(**texts, output_hidden_states=True).hidden_states
    states = patch(model).run(texts, capture=range(LAYERS + 2)).states
    assert torch.equal(states[0], model.get_input_embeddings()(texts["input_ids"]))
    for site in range(1, LAYERS + 1):
        assert torch.equal(states[site], hidden[site - 1])
    assert torch.equal(model.model.final_norm(states[LAYERS + 1])[real], model.model(**texts).last_hidden_state[real])


def test_a_run_that_changes_nothing_and_one_that_resumes_give_the_plain_output(model, texts, same):
    plain = model(**texts)
    patched = patch(model)
    every = range(LAYERS + 2)
    assert same(patched.run(texts, replace=dict.fromkeys(every, torch.clone)).output, plain)
    for site, state in patched.run(texts, capture=every).states.items():
        assert same(patched.run(texts, resume=(site, state)).output, plain)
        assert same(patch(model).run(texts, resume=(site, state)).output, plain)


@pytest.mark.parametrize("site", range(LAYERS + 2))
def test_a_replaced_state_changes_what_lies_above_and_resuming_with_it_does_the_same(model, texts, site, same):
    patched = patch(model)
    every = range(LAYERS + 2)
    plain = patched.run(texts, capture=every)
    new = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))
    replaced = patched.run(texts, capture=every, replace={site: new})
    for other in every:
        assert torch.equal(replaced.states[other], plain.states[other]) == (other <= site)
    assert not same(replaced.output, plain.output)
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    assert same(patched.run(texts, resume=(site, new)).output, replaced.output)
    assert ran == list(range(max(0, site - 1), LAYERS))
    ran.clear()
    stopped = patched.run(texts, capture=range(site + 1), stop=site)
    assert all(torch.equal(state, plain.states[k]) for k, state in stopped.states.items())
    assert ran == list(range(max(0, site - 1)))


def test_gradients_reach_a_replacement_through_the_frozen_model(model, texts):
    patched = patch(model.requires_grad_(False))
    state = patched.run(texts, capture=(0,)).states[0]
    baseline = torch.zeros(16, requires_grad=True)
    output = patched.run(texts, resume=(0, 0.5 * state + 0.5 * baseline)).output
    output.start_logits.square().sum().backward()
    assert baseline.grad.abs().min() > 0
