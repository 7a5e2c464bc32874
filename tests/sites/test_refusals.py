"""What a run refuses, and the words in which it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmask_fast.sites import patch, register_sites


@pytest.mark.parametrize("site", [-1, 5])
@pytest.mark.parametrize("use", ["capture", "replace", "stop", "resume"])
def test_a_site_that_there_is_not_is_refused_with_the_list_of_sites(make_bert, inputs, use, site):
    state = torch.zeros(2, 7, 16)
    request = {"capture": (site,), "replace": {site: state}, "stop": site, "resume": (site, state)}[use]
    with pytest.raises(ValueError, match=rf"no site {site}; the sites of BertModel are\n +0  embedding") as error:
        patch(make_bert()).run(inputs, **{use: request})
    assert "4  last: output 0 of encoder.layer.2" in str(error.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"capture": (1,), "resume": 2}, "sites 2 to 4 only"),
        ({"replace": {1: torch.clone}, "resume": 2}, "sites 2 to 4 only"),
        ({"stop": 1, "resume": 2}, "sites 2 to 1 only"),
        ({"capture": (3,), "stop": 2}, "sites 0 to 2 only"),
        ({"replace": {3: torch.clone}, "stop": 2}, "sites 0 to 2 only"),
        ({"replace": {2: torch.clone}, "resume": 2}, "is where the run resumes"),
    ],
)
def test_a_site_that_the_run_would_not_pass_is_refused(make_bert, inputs, request_, message):
    if "resume" in request_:
        request_ = {**request_, "resume": (request_["resume"], torch.zeros(2, 7, 16))}
    with pytest.raises(ValueError, match=message):
        patch(make_bert()).run(inputs, **request_)


@pytest.mark.parametrize(
    "request_",
    [
        {"capture": 1},
        {"capture": ("embedding",)},
        {"replace": (1, torch.zeros(2, 7, 16))},
        {"replace": {1: "zeros"}},
        {"replace": {1: lambda state: None}},
        {"resume": 1},
        {"resume": (1, None)},
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_its_name(make_bert, inputs, request_):
    with pytest.raises(TypeError, match=f"{next(iter(request_))}:|number of a site"):
        patch(make_bert()).run(inputs, **request_)


def test_inputs_that_are_no_mapping_are_refused(make_bert, inputs):
    with pytest.raises(TypeError, match="inputs: expected a mapping of arguments, got Tensor"):
        patch(make_bert()).run(inputs["input_ids"])


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(1, 7, 16),
        torch.zeros(2, 6, 16),
        torch.zeros(16),
        torch.zeros(2, 7, 16, dtype=torch.bfloat16),
        torch.zeros(2, 7, 16, device="meta"),
    ],
    ids=lambda state: f"{tuple(state.shape)}-{state.dtype}-{state.device}",
)
@pytest.mark.parametrize("site", range(5))
def test_a_state_that_does_not_fit_is_refused_with_both_descriptions(make_bert, inputs, site, state):
    patched = patch(make_bert())
    expected = r"expected \(2, 7, 16\) float32 on cpu"
    with pytest.raises(ValueError, match=f"the state given for site {site} is .*, {expected}"):
        patched.run(inputs, replace={site: state})
    with pytest.raises(ValueError, match=f"the state given for site {site} is .*, {expected}"):
        patched.run(inputs, resume=(site, state))


def test_an_index_where_no_tensor_stands_is_refused(gru, ids):
    wrong = type("WrongIndex", (type(gru),), {})
    register_sites(wrong, [("embedding", "embedding", "output"), ("gru", "gru", "output", 2)])
    with pytest.raises(TypeError, match=r"output 2 of gru: expected a tensor .* got \(Tensor, Tensor\)"):
        patch(wrong()).run(ids, capture=(1,))


def test_a_site_that_the_inputs_go_round_is_an_error(make_bert, inputs):
    model = make_bert()
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    with pytest.raises(RuntimeError, match=r"did not pass site 0 .*inputs_embeds"):
        patch(model).run(embedded, replace={0: torch.zeros(2, 7, 16)})
    patch(model).run(embedded, capture=(1,))


def test_a_module_that_is_called_more_often_than_registered_is_no_site():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, x):
            return self.block(self.block(x))

    register_sites(Shared, [("block", "block", "input")])
    with pytest.raises(RuntimeError, match=r"site 0 .* was passed twice"):
        patch(Shared()).run({"x": torch.ones(1, 2)}, capture=(0,))


def test_gradient_checkpointing_is_refused_where_it_would_run_layers_again(make_bert, inputs):
    model = make_bert().train()
    model.gradient_checkpointing_enable()
    patched = patch(model)
    with pytest.raises(RuntimeError, match="gradient checkpointing on"):
        patched.run(inputs, replace={1: torch.zeros(2, 7, 16)})
    with torch.no_grad():
        patched.run(inputs, replace={1: torch.zeros(2, 7, 16)})
    model.eval()
    patched.run(inputs, replace={1: torch.zeros(2, 7, 16)})


@pytest.mark.parametrize("path", ["", "encoder", "encoder.layer.1"])
def test_a_model_compiled_in_place_is_refused(make_bert, inputs, path):
    model = make_bert()
    model.get_submodule(path).compile(backend="eager")
    with pytest.raises(RuntimeError, match="was compiled in place"):
        patch(model).run(inputs, capture=(1,))


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_what_the_skipped_layers_would_have_output_is_refused(make_bert, inputs, flag):
    model = make_bert()
    patched = patch(model)
    state = patched.run(inputs, capture=(3,)).states[3]
    with pytest.raises(ValueError, match=f"{flag}: the layers below"):
        patched.run({**inputs, flag: True}, resume=(3, state))
    setattr(model.config, flag, True)
    with pytest.raises(ValueError, match=f"{flag}: the layers below"):
        patched.run(inputs, resume=(3, state))
