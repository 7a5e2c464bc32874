"""Gates of pruning code: the published numbers from the same uniforms, by the published names."""

from __future__ import annotations

import math
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from diffmask_fast.compat import l0

LAW = (2 / 3, -0.1, 1.1)
# Logits of uniforms up to 14 and of gates up to 5, rounded a few times in float32, through a slope of 1.2 / (2/3) / 4.
ROUNDING = 1e-5


def uniforms_of(*shape: int) -> Tensor:
    torch.manual_seed(3)
    return torch.empty(*shape).uniform_(1e-6, 1 - 1e-6).double()


def gates_of(logits: Tensor, *shape: int) -> Tensor:
    return plain.draw(uniforms_of(*shape), logits.detach().double(), *LAW, eps=1e-9)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=ROUNDING, atol=ROUNDING)


def zero_chance(logits: Tensor) -> Tensor:
    return 1 - plain.log_nonzero(logits.detach().double(), *LAW).exp()


def seeded(call: Any, *arguments: Any) -> Any:
    torch.manual_seed(3)
    return call(*arguments)


def test_edge_pruning_functions_are_the_published_formulas() -> None:
    logits = (torch.arange(-30, 30) / 6).requires_grad_()
    z = seeded(l0.sample_z_from_log_alpha, logits)
    close(z, gates_of(logits, 60))
    assert (z == 0).any() and (z == 1).any() and torch.autograd.grad(z.sum(), logits)[0].abs().sum() > 0
    u = uniforms_of(60)
    stretched = torch.sigmoid((u.log() - (1 - u).log() + logits.double()) * 1.5) * 1.2 - 0.1
    close(l0.sample_z_from_u(u.float(), logits), stretched)
    close(l0.cdf_stretched_concrete(0, logits), zero_chance(logits))
    x = (0.7 + 0.1) / 1.2
    want = torch.sigmoid(2 / 3 * math.log(x / (1 - x)) - logits.double())
    close(l0.cdf_stretched_concrete(0.7, logits), want)
    assert l0.cdf_stretched_concrete(0, torch.tensor([90.0])).item() == pytest.approx(1e-6)


def test_edge_pruning_evaluates_by_top_k_and_can_round_up() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 3
    z = l0.deterministic_z_from_log_alpha(logits)
    zeros = round(zero_chance(logits).sum().item())
    assert (z == 0).sum() == zeros > 0 and z.shape == logits.shape
    close(z[z > 0], torch.sigmoid(logits * 1.2)[z > 0])
    assert logits[z == 0].max() <= logits[z > 0].min()
    assert torch.equal(l0.deterministic_z_from_log_alpha(logits, apply_one=True), (z > 0).float())
    # As published, with nothing to drop nothing is rounded.
    assert (l0.deterministic_z_from_log_alpha(torch.full((4,), 9.0), apply_one=True) < 1).all()


def test_a_dense_layer_drops_inputs() -> None:
    torch.manual_seed(0)
    layer = l0.L0Dense(5, 4, weight_decay=0.3, lamba=0.7)
    layer.qz_loga.data = torch.tensor([-3.0, -1.0, 0.0, 1.0, 4.0])
    layer.bias.data.normal_()
    x = torch.randn(6, 5)
    z = gates_of(layer.qz_loga, 5)
    close(seeded(layer, x), (x.double() * z) @ layer.weights.double() + layer.bias)
    layer.local_rep = True
    close(seeded(layer, x), (x.double() * gates_of(layer.qz_loga, 6, 5)) @ layer.weights.double() + layer.bias)
    mode = (torch.sigmoid(layer.qz_loga.detach()) * 1.2 - 0.1).clamp(0, 1)
    close(layer.eval()(x), (x * mode) @ layer.weights + layer.bias)
    kept = 1 - zero_chance(layer.qz_loga)
    penalty = (0.15 * layer.weights.double() ** 2 + 0.7).sum(1)
    close(layer.regularization(), -(kept * penalty).sum() - 0.15 * (layer.bias**2).sum())
    assert layer.count_expected_flops_and_l0() == pytest.approx(
        ((2 * kept.sum().item() - 1) * 4 + 4, kept.sum().item() * 4 + 4), rel=1e-5
    )
    assert list(layer.state_dict()) == ["weights", "qz_loga", "bias"]


def test_a_convolution_drops_feature_maps() -> None:
    torch.manual_seed(0)
    layer = l0.L0Conv2d(2, 3, 3, padding=1, weight_decay=0.3, lamba=0.7)
    layer.qz_loga.data = torch.tensor([-2.0, 0.0, 3.0])
    layer.bias.data.normal_()
    x = torch.randn(4, 2, 8, 8)
    with pytest.raises(RuntimeError, match="seen no input"):
        layer.count_expected_flops_and_l0()
    plainly = torch.nn.functional.conv2d(x.double(), layer.weights.double(), padding=1)
    close(seeded(layer, x), plainly * gates_of(layer.qz_loga, 3)[:, None, None])
    layer.local_rep = True
    with_bias = plainly + layer.bias[:, None, None]
    close(seeded(layer, x), with_bias * gates_of(layer.qz_loga, 4, 3)[..., None, None])
    mode = (torch.sigmoid(layer.qz_loga.detach()) * 1.2 - 0.1).clamp(0, 1)
    close(layer.eval()(x), with_bias * mode[:, None, None])
    kept = 1 - zero_chance(layer.qz_loga)
    penalty = (0.15 * layer.weights.double() ** 2 + 0.7).sum((1, 2, 3))
    close(layer.regularization(), -(kept * penalty).sum() - (kept * (0.15 * layer.bias**2 - 0.7)).sum())
    assert layer.count_expected_flops_and_l0()[1] == pytest.approx(19 * kept.sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="divisible"):
        l0.L0Conv2d(3, 4, 3, groups=2)


def test_logits_are_kept_in_the_published_range() -> None:
    layer = l0.L0Dense(3, 2)
    layer.qz_loga.data = torch.tensor([-9.0, 0.0, 9.0])
    layer.constrain_parameters()
    close(layer.qz_loga, torch.tensor([math.log(0.01), 0.0, math.log(100)]))


def test_a_shearing_mask_samples_in_training_and_takes_the_top_k_else() -> None:
    """The published forward raises: it passes an argument that neither of its functions takes."""
    mask = l0.Mask("head", [2, 6], 1, [2, 1, 6, 1], 0.5, 4, "cpu")
    assert abs(mask.z_loga.mean() - 5) < 0.1
    mask.z_loga.data = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)) * 3
    close(seeded(mask), gates_of(mask.z_loga, 2, 6).view(2, 1, 6, 1))
    mask.eval()
    assert mask().shape == (2, 1, 6, 1) and (mask().view(2, 6) == 0).sum(-1).tolist() == [2, 2]
    mask.eval_target_model = False
    zeros = zero_chance(mask.z_loga).sum(-1)
    assert (mask().view(2, 6) == 0).sum(-1).tolist() == [round(n) for n in zeros.tolist()]
    score, sparsity = mask.calculate_expected_score_sparsity()
    close(score, 1 - zero_chance(mask.z_loga))
    close(sparsity, zeros / 6)


def test_a_mask_of_subnetwork_probing_is_the_published_formula() -> None:
    mask = l0.L0Mask((1, 4, 1, 3))
    p = (0.9 + 0.1) / 1.2
    close(mask.mask_scores, torch.full((1, 4, 1, 3), math.log(p / (1 - p))))
    close(mask.eval().produce_mask(), torch.full((1, 4, 1, 3), 0.9))
    mask.train().set_temperature(0.5)
    torch.manual_seed(3)
    u = torch.rand(1, 4, 1, 3).clamp(0.0001, 0.9999).double()
    close(seeded(mask.produce_mask), plain.draw(u, mask.mask_scores.detach().double(), 0.5, -0.1, 1.1, 1e-9))
    want = plain.log_nonzero(mask.mask_scores.detach().double(), 0.5, -0.1, 1.1).exp().mean()
    close(mask.regularizer(), want)


def test_a_masked_layer_of_subnetwork_probing_gates_blocks_of_weights() -> None:
    torch.manual_seed(0)
    plainly = torch.nn.Linear(6, 8)
    layer = l0.MaskedLinear.from_layer(plainly, out_w_per_mask=2, in_w_per_mask=3)
    assert layer.weight is plainly.weight and layer.mask.mask_scores.shape == (1, 4, 1, 2)
    layer.mask.mask_scores.data = torch.randn(1, 4, 1, 2) * 3
    x = torch.randn(5, 6)
    u = seeded(torch.rand, 1, 4, 1, 2).clamp(0.0001, 0.9999).double()
    gates = plain.draw(u, layer.mask.mask_scores.detach().double(), *LAW, 1e-9)[0, :, 0]
    gate_of = torch.tensor([[gates[row % 4, column % 2] for column in range(6)] for row in range(8)])
    close(seeded(layer, x), x.double() @ (gate_of * plainly.weight).T + plainly.bias)
    close(seeded(layer.produce_mask_reshaped), gate_of)
    assert list(layer.state_dict()) == ["weight", "bias", "mask.mask_scores"]
    layer.eval().activate_caching()
    both = torch.cat([layer(x), layer(2 * x)])
    assert torch.equal(layer.cached_activation, both.detach())
    layer.activate_caching(False)
    assert layer(x) is not None and layer.cached_activation is None


def test_a_masked_layer_starts_where_it_is_told_and_refuses_what_does_not_fit() -> None:
    """The published one starts at 0.9 whatever it is told."""
    close(l0.MaskedLinear(4, 2, mask_p=0.5).eval().produce_mask(), torch.full((1, 2, 1, 4), 0.5))
    with pytest.raises(ValueError, match="6 features are no multiple of 4"):
        l0.MaskedLinear(6, 8, in_w_per_mask=4)
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Conv1d"):
        l0.MaskedLinear.from_layer(torch.nn.Conv1d(1, 1, 1), 1, 1)
