"""Sites derived for Hugging Face models, each tiny and random: a family is one line of FAMILIES."""

from __future__ import annotations

import inspect

import architectures
import pytest
import torch

transformers = pytest.importorskip("transformers")

# Name of the configuration, and the part whose sites they are where it isn't the one that the inputs feed.
FAMILIES = [
    ("bert", ""),
    ("roberta", ""),
    ("distilbert", ""),
    ("albert", ""),
    ("electra", ""),
    ("deberta-v2", ""),
    ("mpnet", ""),
    ("modernbert", ""),
    ("longformer", ""),
    ("gpt2", ""),
    ("llama", ""),
    ("qwen2", ""),
    ("qwen3", ""),
    ("mistral", ""),
    ("t5", ""),
    ("t5", "decoder"),
    ("bart", ""),
    ("bart", "decoder"),
    ("vit", ""),
    ("deit", ""),
    ("wav2vec2", ""),
]
WITHOUT_EMBEDDING = {"wav2vec2"}
_made: dict[tuple[str, str], tuple] = {}


@pytest.fixture(params=["eager", "sdpa"])
def tiny(request, family):
    """A model, inputs for it, the part."""
    name, part = family
    if (name, request.param) not in _made:
        torch.manual_seed(0)
        config = architectures.tiny_config(transformers.CONFIG_MAPPING[name]())
        try:
            model = transformers.AutoModel.from_config(config, attn_implementation=request.param).eval()
        except ValueError as error:
            assert "scaled_dot_product_attention" in str(error) and request.param == "sdpa"
            pytest.skip(f"transformers has no SDPA for {name}")
        takes = set(inspect.signature(model.forward).parameters)
        inputs = next(c for c in architectures.candidates(config) if set(c) <= takes and model.main_input_name in c)
        _made[name, request.param] = model, inputs
    return (*_made[name, request.param], part)


@pytest.fixture(params=FAMILIES, ids=lambda family: " ".join(family).strip())
def family(request):
    return request.param


@pytest.mark.parametrize("holds", architectures.PROPERTIES, ids=lambda check: check.__name__)
def test_of_each_family(tiny, holds, family):
    if holds is architectures.captures_the_embedding and family[0] in WITHOUT_EMBEDDING:
        pytest.skip("the model names no embedding: its sites begin with the first layer")
    model, inputs, part = tiny
    with torch.no_grad():
        holds(model, inputs, part)
