"""The table of sites and the look-up in it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from diffmask_fast.sites import Site, register_sites, sites_of


class Encoder(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))


def test_bert_has_the_word_embedding_each_layers_input_and_the_last_output(make_bert):
    assert sites_of(make_bert(layers=2)) == (
        Site("embedding", "embeddings.word_embeddings", "output", 0),
        Site("layer 0", "encoder.layer.0", "input", 0),
        Site("layer 1", "encoder.layer.1", "input", 0),
        Site("last", "encoder.layer.1", "output", 0),
    )


@pytest.mark.parametrize(
    "head",
    ["SequenceClassification", "QuestionAnswering", "MaskedLM", "TokenClassification", "MultipleChoice"],
)
def test_a_model_with_a_head_has_the_sites_of_its_base_model_under_its_prefix(make_bert, head):
    model = make_bert(f"BertFor{head}")
    base = sites_of(make_bert())
    assert [site.module for site in sites_of(model)] == [f"bert.{site.module}" for site in base]
    assert all(model.get_submodule(site.module) for site in sites_of(model))


def test_a_subclass_has_the_sites_of_its_parent(make_bert):
    class Derived(type(make_bert())):
        pass

    model = Derived(make_bert().config)
    assert sites_of(model) == sites_of(make_bert())


def test_a_gru_classifier_registers_itself(gru):
    assert sites_of(gru) == (Site("embedding", "embedding", "output", 0), Site("gru", "gru", "output", 0))


def test_a_class_may_be_registered_by_its_name():
    named = type("KnownByName", (Encoder,), {})
    register_sites("KnownByName", [("block {i}", "blocks.*", "output")])
    assert [str(site) for site in sites_of(named(depth=2))] == [
        "block 0: output 0 of blocks.0",
        "block 1: output 0 of blocks.1",
    ]


def test_a_second_registration_replaces_the_first():
    again = type("Again", (Encoder,), {})
    register_sites(again, [("first", "words", "output")])
    register_sites(again, [("second", "blocks.-2", "input")])
    assert sites_of(again(depth=3)) == (Site("second", "blocks.1", "input"),)


def test_the_error_for_an_unknown_class_is_the_code_that_registers_it():
    unknown = type("Unknown", (Encoder,), {})
    with pytest.raises(ValueError, match="no sites are registered for Unknown") as error:
        sites_of(unknown(depth=2))
    code = "\n".join(line[4:] for line in str(error.value).splitlines()[1:])
    exec(code, {"Unknown": unknown})
    assert [site.module for site in sites_of(unknown(depth=2))] == [
        "words",
        "blocks.0",
        "blocks.1",
        "blocks.1",
    ]


def test_the_error_for_a_hugging_face_model_that_declares_no_layers_names_its_base_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.TextNetConfig(conv_layer_kernel_sizes=[[[3, 3]]] * 4, conv_layer_strides=[[2]] * 4)
    model = transformers.TextNetForImageClassification(config)
    with pytest.raises(ValueError, match=r"register_sites\(TextNetModel") as error:
        sites_of(model)
    assert "TextNetForImageClassification, nor for its base model TextNetModel" in str(error.value)


@pytest.mark.parametrize("module", ["absent", "words.absent", "blocks.7", "blocks.-3", "words.*"])
def test_a_registered_path_that_an_instance_lacks_is_an_error_that_names_it(module):
    partial = type("Partial", (Encoder,), {})
    register_sites(partial, [("state {i}" if "*" in module else "state", module, "output")])
    with pytest.raises(ValueError, match=f"Partial.*has no '{module.split('.')[-1]}'".replace("*'", r"\*'")):
        sites_of(partial(depth=2))


@pytest.mark.parametrize(
    "row",
    [
        ("only a name",),
        ("name", "path"),
        ("name", "path", "inside"),
        ("name", "path", "input", -1),
        ("name", "path", "input", "0"),
        ("name", "path.*", "input"),
        ("name {i}", "path", "input"),
        ("name {i}", "path.*.child", "input"),
        ["name", "path", "input"],
        ("name", 3, "input"),
    ],
)
def test_a_malformed_row_is_refused(row):
    with pytest.raises((TypeError, ValueError), match="register_sites"):
        register_sites("Malformed", [row])


def test_two_rows_of_one_name_no_rows_and_two_chains_are_refused():
    row = ("a", "x", "input")
    for rows in ([row, row], [], [("a {i}", "x.*", "input"), ("b {i}", "y.*", "input")]):
        with pytest.raises(ValueError, match="row"):
            register_sites("Malformed", rows)


def test_an_instance_can_not_be_registered(gru):
    with pytest.raises(TypeError, match="pass type\\(model\\)"):
        register_sites(gru, [("a", "embedding", "output")])


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        sites_of("BertModel")


def test_wrapped_models_are_refused_with_the_name_of_what_is_inside(gru, make_bert):
    for model in (gru, make_bert("BertForQuestionAnswering")):
        name = type(model).__name__
        with pytest.raises(ValueError, match=rf"DataParallel wraps .* {name} inside it, model.module"):
            sites_of(nn.DataParallel(model))
        with pytest.raises(ValueError, match=rf"OptimizedModule wraps .* {name} inside it, model._orig_mod"):
            sites_of(torch.compile(model, backend="eager"))


def test_importing_sites_loads_no_other_library_than_torch():
    code = "import sys, diffmask_fast.sites; print([m for m in ('transformers', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
