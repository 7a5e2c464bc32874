"""Vision DiffMask's names: its own gate arguments, and a ViT's states."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

from diffmask_fast.compat.checkpoints import gate_state, probe_of
from diffmask_fast.compat.vision import DiffMaskGateInput, MLPMaxGate, vit_getter, vit_setter
from diffmask_fast.masking import keep_probabilities
from diffmask_fast.ops import draw_seed, uniforms

B, T, H, A, L = 2, 5, 6, 4, 3


def states_of(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, T, H, generator=generator).to(dtype) for _ in range(L)]


@pytest.mark.parametrize("aggregated", [True, False])
@pytest.mark.parametrize("layer_pred", [1, None])
def test_the_gate_is_the_published_formula(layer_pred: int | None, aggregated: bool) -> None:
    torch.manual_seed(0)
    gate = DiffMaskGateInput(H, A, L, 1, MLPMaxGate, 7.0, 1.5, True, True).double()
    torch.manual_seed(9)
    got = gate(states_of(), layer_pred, aggregated)
    torch.manual_seed(9)
    count = L if layer_pred is None else layer_pred + 1
    u = uniforms(draw_seed(), B * T * count).view(B, T, count).double()
    eps = torch.finfo(torch.float64).eps
    parameters = dict(gate.named_parameters())
    want = plain.input_gate(parameters, states_of(), layer_pred, u, 7.0, "add_activation", eps, aggregated)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)
    grads = [
        torch.autograd.grad(out[0].sum() + out[4].sum(), gate.parameters(), allow_unused=True) for out in (got, want)
    ]
    for g, w in zip(*grads, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_the_trainable_shift_has_the_published_name() -> None:
    gate = DiffMaskGateInput(H, A, L, 1, add_activation=8)
    assert "g_hat.1.add_activation" in gate.state_dict() and gate.g_hat[1].add_activation == 8.0
    assert "g_hat.1.bias" not in gate.state_dict()


def test_its_gate_becomes_a_probe() -> None:
    torch.manual_seed(0)
    gate = DiffMaskGateInput(H, A, L, 1, mul_activation=15.0, add_activation=3.0, placeholder=True)
    nn.init.normal_(gate.g_hat[1].f[2].bias)
    probe = probe_of(gate_state(gate.state_dict()), max_activation=15.0)
    states = states_of(torch.float32)
    want = gate(states, None)[4].exp()
    torch.testing.assert_close(keep_probabilities(probe, dict(enumerate(states))), want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def vit() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=H * 2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval()


def test_states_of_a_vit_are_its_patches_and_its_own_hidden_states(vit: Any) -> None:
    x = torch.randn(B, 3, 8, 8)
    logits, states = vit_getter(vit, x)
    own = vit(x, output_hidden_states=True)
    assert torch.equal(logits, own.logits) and len(states) == 4
    assert torch.equal(states[0], vit.vit.embeddings.patch_embeddings(x))
    assert torch.equal(states[1], own.hidden_states[0])
    torch.testing.assert_close(states[2], own.hidden_states[1])


def test_patches_are_given_with_the_class_token_which_is_cut_off(vit: Any) -> None:
    x = torch.randn(B, 3, 8, 8)
    logits, states = vit_getter(vit, x)
    with_class = torch.cat([torch.full((B, 1, H * 2), 99.0), states[0]], 1)
    same, seen = vit_setter(vit, x, [with_class, None, None, None])
    assert torch.equal(same, logits) and torch.equal(seen[0], states[0])
    changed, _ = vit_setter(vit, x, [with_class * 0.5, None, None, None])
    assert not torch.equal(changed, logits)
    assert not torch.equal(vit_setter(vit, x, [None, None, None, states[3].flip(-1)])[0], logits)
