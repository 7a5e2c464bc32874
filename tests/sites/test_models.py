"""Sites derived for Hugging Face models, each tiny and random: a family is one line of FAMILIES."""

from __future__ import annotations

import inspect

import architectures
import pytest
import torch

from diffmask_fast.sites import patch

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
    ("hubert", ""),
    ("wavlm", ""),
]
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
def test_of_each_family(tiny, holds):
    model, inputs, part = tiny
    if holds is architectures.captures_the_embedding and model.main_input_name == "pixel_values":
        pytest.skip("patches of a picture have no token for the whole of it, so they are no site")
    with torch.no_grad():
        holds(model, inputs, part)


def test_eager_and_sdpa_agree(family):
    """To float32: states are near 1, sums of a few dozen terms, 3 layers of them."""
    name, part = family
    config = architectures.tiny_config(transformers.CONFIG_MAPPING[name]())
    states = []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        try:
            model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
        except ValueError:
            pytest.skip(f"transformers has no SDPA for {name}")
        takes = set(inspect.signature(model.forward).parameters)
        inputs = next(c for c in architectures.candidates(config) if set(c) <= takes and model.main_input_name in c)
        patched = patch(model, part)
        with torch.no_grad():
            states.append(patched.run(inputs, capture=range(len(patched.sites))).states)
    for k, state in states[0].items():
        real = inputs["attention_mask"].bool() if state.shape[:2] == (2, 8) and "attention_mask" in inputs else ...
        torch.testing.assert_close(states[1][k][real], state[real], rtol=0, atol=1e-5 * state.abs().max().item())
