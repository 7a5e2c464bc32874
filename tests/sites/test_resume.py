"""Stop and resume against the plain model: bit for bit, with fewer layers run."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from diffmask_fast.sites import patch, register_sites

# --- stop ---


@pytest.mark.parametrize("site", range(5))
def test_stop_gives_the_states_up_to_the_site_and_runs_no_layer_above(make_bert, inputs, site, attention_calls):
    model = make_bert("BertForMaskedLM")
    patched = patch(model)
    plain = patched.run(inputs, capture=range(5)).states
    calls = attention_calls(model)
    stopped = patched.run(inputs, capture=range(site + 1), stop=site)
    assert stopped.output is None
    assert list(stopped.states) == list(range(site + 1))
    assert all(torch.equal(stopped.states[k], plain[k]) for k in stopped.states)
    assert calls == list(range(max(0, site - 1)))


def test_stop_passes_a_model_that_catches_exceptions():
    class Cautious(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            try:
                return self.second(self.first(x))
            except Exception as error:
                caught.append(error)
                return x

    caught = []
    register_sites(Cautious, [("first", "first", "output")])
    with torch.no_grad():
        run = patch(Cautious()).run({"x": torch.ones(1, 2)}, stop=0, capture=(0,))
    assert run.output is None and list(run.states) == [0]
    assert caught == []


def test_a_stopped_run_keeps_no_state_but_the_captured_ones(make_bert, inputs):
    model = make_bert()
    passing = []
    model.encoder.layer[0].attention.register_forward_hook(lambda _, __, out: passing.append(weakref.ref(out[0])))
    gc.disable()  # so that a state held by a cycle would be found here
    try:
        with torch.no_grad():
            run = patch(model).run(inputs, capture=(2,), stop=2)
        assert len(passing) == 1 and passing[0]() is None
        assert list(run.states) == [2]
    finally:
        gc.enable()


# --- resume ---


@pytest.mark.parametrize("layers", [1, 3])
def test_resume_with_the_models_own_state_gives_the_plain_output(make_bert, inputs, head, attention, layers, same):
    model = make_bert(head, attention, layers)
    plain = model(**inputs)
    first = patch(model)
    states = first.run(inputs, capture=range(layers + 2)).states
    for site, state in states.items():
        assert same(first.run(inputs, resume=(site, state)).output, plain)
        assert same(patch(model).run(inputs, resume=(site, state)).output, plain)  # a handle that saw no run


@pytest.mark.parametrize("site", range(5))
def test_resume_with_another_state_does_as_a_replacement_does(make_bert, inputs, site, same):
    patched = patch(make_bert("BertForTokenClassification"))
    new = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))
    replaced = patched.run(inputs, replace={site: new}, capture=range(site + 1, 5))
    resumed = patched.run(inputs, resume=(site, new), capture=range(site, 5))
    assert same(resumed.output, replaced.output)
    assert torch.equal(resumed.states[site], new)
    assert all(torch.equal(resumed.states[k], replaced.states[k]) for k in replaced.states)


@pytest.mark.parametrize("site", range(5))
def test_resume_runs_no_layer_below_its_site(make_bert, inputs, site, attention_calls):
    model = make_bert("BertForQuestionAnswering")
    patched = patch(model)
    states = patched.run(inputs, capture=range(5)).states
    calls = attention_calls(model)
    patched.run(inputs, resume=(site, states[site]))
    assert calls == list(range(max(0, site - 1), 3))


def test_only_the_first_resume_after_the_last_layer_runs_a_layer(make_bert, inputs, attention_calls):
    model = make_bert()
    state = patch(model).run(inputs, capture=(4,)).states[4]
    patched = patch(model)
    calls = attention_calls(model)
    patched.run(inputs, resume=(4, state))
    assert calls == [0]  # to show whether a layer returns a tensor or a tuple
    patched.run(inputs, resume=(4, state))
    assert calls == [0]


def test_resume_and_stop_run_only_what_lies_between(make_bert, inputs, attention_calls):
    model = make_bert()
    patched = patch(model)
    states = patched.run(inputs, capture=range(5)).states
    calls = attention_calls(model)
    run = patched.run(inputs, resume=(2, states[2]), stop=3, capture=(3,))
    assert calls == [1]
    assert run.output is None and torch.equal(run.states[3], states[3])


def test_a_replacement_above_the_site_of_resume_is_made(make_bert, inputs):
    patched = patch(make_bert())
    state = patched.run(inputs, capture=(2,)).states[2]
    both = patched.run(inputs, resume=(2, state), replace={3: lambda s: s + 1, 4: torch.ones(2, 7, 16)}).output
    assert torch.equal(both.last_hidden_state, torch.ones(2, 7, 16))


def test_a_model_without_a_chain_skips_the_sites_own_module_once_it_is_known_to_return_the_state_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x)).exp()

    register_sites(Two, [("first", "first", "output"), ("second", "second", "output")])
    model, x = Two(), {"x": torch.ones(1, 2)}
    calls = []
    patched = patch(model)
    plain = patched.run(x, capture=(1,))
    model.second.forward = lambda x, forward=model.second.forward: calls.append(1) or forward(x)
    assert torch.equal(patched.run(x, resume=(1, plain.states[1])).output, plain.output)
    assert calls == []
    assert torch.equal(patch(model).run(x, resume=(1, plain.states[1])).output, plain.output)
    assert calls == [1]


def test_a_module_that_returns_more_than_the_state_runs_on_resume(gru, ids):
    patched = patch(gru)
    plain = patched.run(ids, capture=(1,))
    assert torch.equal(patched.run(ids, resume=(1, plain.states[1])).output, plain.output)


def test_a_chain_of_outputs_in_tuples_is_resumed_like_one_of_inputs():
    class Block(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.blocks = nn.ModuleList(Block(2, 2) for _ in range(3))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)[0]
            return x

    register_sites(Stack, [("first", "first", "output"), ("block {i}", "blocks.*", "output")])
    model, x = Stack(), {"x": torch.ones(3, 2)}
    plain = patch(model).run(x, capture=range(4))
    patched = patch(model)
    for site in (3, 2, 1, 0, 1, 2, 3):
        assert torch.equal(patched.run(x, resume=(site, plain.states[site])).output, plain.output)


def test_under_autocast_resume_gives_the_plain_output(make_bert, inputs, same):
    patched = patch(make_bert("BertForQuestionAnswering"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = patched.run(inputs, capture=range(5))
        for site, state in plain.states.items():
            assert same(patched.run(inputs, resume=(site, state)).output, plain.output)
