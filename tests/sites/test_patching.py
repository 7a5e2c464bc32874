"""Capture and replacement against the plain model, bit for bit, and what is left of them: nothing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from architectures import snapshot
from torch import nn

from diffmask_fast.sites import patch, register_sites

# --- capture and replacement ---


def test_a_run_that_changes_nothing_gives_the_plain_output(make_bert, inputs, head, attention, same):
    model = make_bert(head, attention)
    plain = model(**inputs)
    with patch(model) as patched:
        every = range(len(patched.sites))
        assert same(patched.run(inputs).output, plain)
        assert same(patched.run(inputs, replace=dict.fromkeys(every, lambda state: state)).output, plain)
        assert same(patched.run(inputs, replace=dict.fromkeys(every, torch.clone)).output, plain)


def test_captured_states_are_the_hidden_states_that_transformers_gives(make_bert, inputs, head, attention):
    model = make_bert(head, attention)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    patched = patch(model)
    states = patched.run(inputs, capture=range(len(patched.sites))).states
    assert list(states) == [0, 1, 2, 3, 4]
    assert torch.equal(states[0], model.get_input_embeddings()(inputs["input_ids"]))
    for site in (1, 2, 3, 4):
        assert torch.equal(states[site], hidden[site - 1])


def test_the_models_own_output_of_hidden_states_holds_the_replaced_ones(make_bert, inputs):
    patched = patch(make_bert())
    new = torch.randn(2, 7, 16)
    asking = {**inputs, "output_hidden_states": True}
    patched.run(asking)  # transformers 5 leaves its own hooks behind on the first such call
    assert torch.equal(patched.run(asking, replace={4: new}).output.hidden_states[3], new)


def test_a_replaced_state_reaches_everything_above_it(make_bert, inputs, head, same):
    patched = patch(make_bert(head))
    plain = patched.run(inputs, capture=(0, 1, 2, 3, 4))
    for site in range(5):
        changed = patched.run(inputs, capture=(0, 1, 2, 3, 4), replace={site: lambda state: state + 1})
        for other in range(5):
            assert torch.equal(changed.states[other], plain.states[other]) == (other <= site)
        assert not same(changed.output, plain.output)


def test_a_state_is_captured_before_it_is_replaced(make_bert, inputs):
    patched = patch(make_bert())
    plain = patched.run(inputs, capture=(2,)).states[2]
    assert torch.equal(patched.run(inputs, capture=(2,), replace={2: torch.zeros(2, 7, 16)}).states[2], plain)


def test_a_function_gets_the_state_as_the_replacements_below_made_it(make_bert, inputs):
    patched = patch(make_bert())
    zeros = torch.zeros(2, 7, 16)
    seen = []
    patched.run(inputs, replace={2: zeros, 3: lambda state: seen.append(state) or state})
    assert torch.equal(seen[0], patched.run(inputs, capture=(3,), replace={2: zeros}).states[3])


def test_the_entry_of_a_tuple_is_replaced_and_the_rest_of_it_stays(gru, ids):
    patched = patch(gru)
    plain = patched.run(ids, capture=(0, 1))
    assert plain.states[0].shape == (2, 5, 12)
    assert torch.equal(plain.states[1], gru.gru(plain.states[0])[0])
    new = torch.randn(2, 5, 8)
    assert torch.equal(patched.run(ids, replace={1: new}).output, gru.classifier(new.mean(1)))


def test_under_autocast_a_replacement_is_cast_to_the_dtype_of_the_state(gru):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x))

    register_sites(Half, [("first", "first", "output")])
    model, x = Half(), {"x": torch.ones(1, 4)}
    entering = []
    model.second.register_forward_pre_hook(lambda _, args: entering.append(args[0].dtype))
    patched = patch(model)
    new = torch.zeros(1, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = patched.run(x, capture=(0,), replace={0: new})
    assert run.states[0].dtype == torch.bfloat16
    assert entering == [torch.bfloat16]
    run.output.sum().backward()
    assert new.grad.dtype == torch.float32 and new.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"is \(1, 4\) bfloat16 on cpu, expected \(1, 4\) float32"):
        patched.run(x, replace={0: new.bfloat16()})


# --- gradients ---


@pytest.mark.parametrize("site", range(5))
def test_the_gradient_of_a_replacement_is_the_gradient_of_the_state(make_bert, inputs, site):
    patched = patch(make_bert("BertForQuestionAnswering"))
    plain = patched.run(inputs, capture=(site,))
    (expected,) = torch.autograd.grad(plain.output.start_logits.square().sum(), plain.states[site])
    new = plain.states[site].detach().requires_grad_()
    patched.run(inputs, replace={site: new}).output.start_logits.square().sum().backward()
    assert torch.equal(new.grad, expected)
    resumed = plain.states[site].detach().requires_grad_()
    patched.run(inputs, resume=(site, resumed)).output.start_logits.square().sum().backward()
    assert torch.equal(resumed.grad, expected)


def test_gradients_flow_through_a_replacement_to_what_made_it_in_a_frozen_model(make_bert, inputs):
    model = make_bert("BertForSequenceClassification").requires_grad_(False)
    patched = patch(model)
    baseline = torch.zeros(16, requires_grad=True)
    gate = torch.rand(2, 7, 1, generator=torch.Generator().manual_seed(3))
    output = patched.run(inputs, replace={0: lambda state: gate * state + (1 - gate) * baseline}).output
    output.logits.sum().backward()
    assert baseline.grad.abs().min() > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_captured_state_has_a_graph_only_where_gradients_are_on(make_bert, inputs):
    patched = patch(make_bert())
    assert patched.run(inputs, capture=(2,)).states[2].requires_grad
    with torch.no_grad():
        assert not patched.run(inputs, capture=(2,)).states[2].requires_grad


# --- the model stays as it was ---


@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_as_before_to_the_last_attribute(make_bert, inputs, train):
    model = make_bert("BertForQuestionAnswering").train(train)
    model.bert.encoder.layer[0].requires_grad_(False)
    before = snapshot(model)
    patched = patch(model)
    assert snapshot(model) == before
    states = patched.run(inputs, capture=range(5)).states
    for site, state in states.items():
        patched.run(inputs, stop=site)
        patched.run(inputs, resume=(site, state.detach()))
        patched.run(inputs, replace={site: state.detach()})
    with pytest.raises(ValueError):
        patched.run(inputs, resume=(3, states[3][:1]))
    with pytest.raises(ZeroDivisionError):
        patched.run(inputs, replace={3: lambda state: 1 / 0})
    assert snapshot(model) == before
    patched.remove()
    assert snapshot(model) == before


def test_a_forward_that_stood_on_the_instance_stands_there_again(make_bert, inputs):
    model = make_bert()
    patched = patch(model)
    state = patched.run(inputs, capture=(3,)).states[3]
    layer = model.encoder.layer[0]
    layer.forward = forward = layer.forward
    before = snapshot(model)
    patched.run(inputs, resume=(3, state))
    assert snapshot(model) == before and layer.__dict__["forward"] is forward


def test_a_run_leaves_the_users_hooks_alone_and_sees_what_they_make(make_bert, inputs, same):
    model = make_bert()
    model.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    plain = model(**inputs)
    doubled = []
    model.encoder.layer[1].attention.register_forward_pre_hook(lambda _, args: doubled.append(args[0]))
    before = snapshot(model)
    run = patch(model).run(inputs, capture=(2,))
    assert torch.equal(run.states[2], doubled[0]) and same(run.output, plain)
    assert snapshot(model) == before


def test_handles_of_one_model_nest(make_bert, inputs, same):
    model = make_bert("BertForQuestionAnswering")
    plain = model(**inputs)
    with patch(model) as outer:
        with patch(model) as inner, patch(model.bert) as base:
            states = inner.run(inputs, capture=(1,)).states
            assert torch.equal(base.run(inputs, capture=(1,)).states[1], states[1])
            assert not same(outer.run(inputs, replace={1: states[1] + 1}).output, plain)
        assert torch.equal(outer.run(inputs, capture=(1,)).states[1], states[1])
    assert same(model(**inputs), plain)


def test_a_removed_handle_refuses_to_run_and_may_be_removed_again(gru, ids):
    with patch(gru) as patched:
        patched.run(ids)
    patched.remove()
    with pytest.raises(RuntimeError, match=r"removed: call patch\(model\)"):
        patched.run(ids)


def test_a_removed_handle_does_not_keep_the_model():
    short = type("Short", (nn.Sequential,), {})
    register_sites(short, [("first", "0", "output")])
    model = short(nn.Linear(2, 2))
    patched, alive = patch(model), weakref.ref(model)
    patched.remove()
    del model
    gc.collect()
    assert alive() is None


# --- one run at a time ---


def test_a_second_run_of_the_model_in_another_thread_is_refused(make_bert, inputs):
    model = make_bert("BertForQuestionAnswering")
    entered, leave = threading.Event(), threading.Event()

    def wait(state):
        entered.set()
        leave.wait(30)
        return state

    first = threading.Thread(target=lambda: patch(model).run(inputs, replace={2: wait}))
    first.start()
    try:
        assert entered.wait(30)
        for other in (model, model.bert):
            with pytest.raises(RuntimeError, match="another run of this model is under way"):
                patch(other).run(inputs)
        patch(make_bert("BertForQuestionAnswering")).run(inputs)
    finally:
        leave.set()
        first.join()
    patch(model).run(inputs)


def test_a_run_inside_a_run_is_refused(gru, ids):
    patched = patch(gru)
    with pytest.raises(RuntimeError, match="around this one"):
        patched.run(ids, replace={0: lambda state: patched.run(ids, capture=(0,)).states[0]})
    patched.run(ids)
