"""CoFi's gates of a whole encoder: the published numbers from the same uniforms, spelled out plainly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

from diffmask_fast.compat.cofi import L0Module

LAW = (2 / 3, -0.1, 1.1)
ROUNDING = 1e-5  # as in test_l0.py; sums of up to 96 such terms are compared relatively
LAYERS, HEADS, WIDTH, INNER = 3, 2, 8, 12
CONFIG = SimpleNamespace(
    hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_hidden_layers=LAYERS, vocab_size=10
)
SHAPES = {
    "head_z": (LAYERS, 1, HEADS, 1, 1),
    "intermediate_z": (LAYERS, 1, 1, INNER),
    "hidden_z": (WIDTH,),
    "mlp_z": (LAYERS,),
    "head_layer_z": (LAYERS,),
}


def module(pruning_type: str | None = None, **settings: Any) -> L0Module:
    torch.manual_seed(0)
    made = L0Module(CONFIG, **settings, **({} if pruning_type is None else {"pruning_type": pruning_type}))
    for loga in made.z_logas.values():
        loga.data.normal_(0.5, 2)
    return made


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=ROUNDING, atol=ROUNDING)


def kept(loga: Tensor) -> Tensor:
    return plain.log_nonzero(loga.detach().double(), *LAW).exp()


def test_it_has_the_published_names_shapes_and_starts() -> None:
    torch.manual_seed(0)
    made = L0Module(CONFIG, droprate_init=0.2)
    assert made.types == ["head", "intermediate", "hidden", "mlp", "head_layer"]
    assert sorted(made.state_dict()) == [
        *("head_loga", "headlayer_loga", "hidden_loga", "int_loga", "intlayer_loga", "lambda_1", "lambda_2"),
    ]
    for name, mean in (("head_loga", 10.0), ("hidden_loga", 10.0), ("intlayer_loga", 10.0), ("int_loga", 1.386294)):
        assert (getattr(made, name) - mean).abs().max() < 0.05
    assert made.prunable_model_size == LAYERS * ((4 * 64 + 32) + (2 * 96 + 40))
    made.reset_qz_logas()
    assert abs(made.hidden_loga.mean().item() - 1.386294) < 0.05 and abs(made.head_loga.mean().item() - 10) < 0.05
    made.constrain_parameters()
    assert made.head_loga.max().item() == pytest.approx(4.6051702)


def test_gates_are_sampled_from_the_published_uniforms_in_their_order() -> None:
    made = module()
    torch.manual_seed(3)
    found = made(training=True)
    torch.manual_seed(3)
    for name, loga in made.z_logas.items():
        u = torch.empty(loga.shape).uniform_(1e-6, 1 - 1e-6).double()
        close(found[f"{name}_z"], plain.draw(u, loga.detach().double(), *LAW, eps=1e-9).view(SHAPES[f"{name}_z"]))
    assert {name: tuple(z.shape) for name, z in found.items()} == SHAPES
    (gradient,) = torch.autograd.grad(found["head_z"].sum(), made.head_loga)
    assert gradient.abs().sum() > 0


def test_without_sampling_as_many_are_dropped_in_each_layer_as_are_expected_to_be() -> None:
    made = module()
    found = made(training=False)
    assert {name: tuple(z.shape) for name, z in found.items()} == SHAPES
    for name, loga in made.z_logas.items():
        rows = loga.detach().view(1, -1) if name == "hidden" else loga.detach().view(LAYERS, -1)
        for row, gates in zip(rows, found[f"{name}_z"].view(rows.shape), strict=True):
            zeros = round(len(row) - kept(row).sum().item())
            order = row.argsort()
            assert (gates[order[:zeros]] == 0).all()
            close(gates[order[zeros:]], torch.sigmoid(row[order[zeros:]] * 1.2))


@pytest.mark.parametrize("steps", [0, 30, 500])
def test_the_penalty_is_the_published_one(steps: int) -> None:
    made = module(lagrangian_warmup=100, start_sparsity=0.1, target_sparsity=0.6)
    made.lambda_1.data.fill_(0.7)
    made.lambda_2.data.fill_(2.0)
    penalty, sparsity, target = made.lagrangian_regularization(steps)
    head = (kept(made.headlayer_loga)[:, None] * kept(made.head_loga)).reshape(-1)
    inner = (kept(made.intlayer_loga)[:, None] * kept(made.int_loga)).reshape(-1)
    hidden = kept(made.hidden_loga)
    per_head = (4 * WIDTH * WIDTH + 4 * WIDTH) // HEADS
    size = torch.outer(hidden, head).sum() * per_head / WIDTH + torch.outer(hidden, inner).sum() * 2
    close(sparsity, 1 - size / made.prunable_model_size)
    assert target == pytest.approx(0.1 + 0.5 * min(1, steps / 100))
    gap = sparsity.detach().double() - target
    close(penalty, 0.7 * gap + 2 * gap**2)
    penalty.backward()
    assert all(loga.grad.abs().sum() > 0 for loga in made.z_logas.values())


@pytest.mark.parametrize("pruning_type", ["structured_heads+structured_mlp+layer", "structured_heads+structured_mlp"])
def test_fewer_kinds_of_gates_have_their_size_too(pruning_type: str) -> None:
    """The published module has no size without gates of layers: it raises."""
    made = module(pruning_type)
    _, sparsity, _ = made.lagrangian_regularization(0)
    layers = "layer" in pruning_type
    head, inner = kept(made.head_loga), kept(made.int_loga)
    if layers:
        head, inner = kept(made.headlayer_loga)[:, None] * head, kept(made.intlayer_loga)[:, None] * inner
    per_head, per_inner = (4 * 64 + 32) // HEADS, (2 * 96 + 40) // INNER
    close(sparsity, 1 - (head.sum() * per_head + inner.sum() * per_inner) / made.prunable_model_size)
    report = made.calculate_model_size(made(training=False))
    assert report["hidden_dims"] == WIDTH and len(report["head_nums"]) == LAYERS


def test_the_size_of_what_is_left() -> None:
    made = module()
    zs = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    zs["head_z"][0, 0, 1] = 0
    zs["intermediate_z"][2, 0, 0, :5] = 0
    zs["mlp_z"][1] = 0
    zs["hidden_z"][:2] = 0
    found = made.calculate_model_size(zs)
    assert found["head_nums"] == [1, 2, 2] and found["intermediate_dims"] == [12, 12, 7]
    assert found["mlp_layers"] == [1, 0, 1] and found["head_layers"] == [1, 1, 1] and found["hidden_dims"] == 6
    left = 5 * 6 * (WIDTH // HEADS) * 4 + (12 + 7) * 6 * 2
    assert found["remaining_params"] == left
    assert found["pruned_params"] == made.prunable_model_size - left
    assert found["pruned_model_sparsity"] == pytest.approx(1 - left / made.prunable_model_size)


def test_an_encoder_that_names_its_inner_width_otherwise_and_a_wrong_type() -> None:
    other = SimpleNamespace(**{**vars(CONFIG), "intermediate_size": None, "ffn_dim": 20})
    assert L0Module(other).int_loga.shape == (LAYERS, 20)
    for wrong in ("heads", "hidden+layer"):
        with pytest.raises(ValueError, match=r"pruning_type is '.*'; expected names joined by"):
            L0Module(CONFIG, pruning_type=wrong)


@pytest.mark.parametrize("pruning_type", ["structured_heads", "structured_mlp+layer", "structured_heads+hidden"])
def test_a_share_is_of_what_can_be_pruned(pruning_type: str) -> None:
    """The published module counts what it can't prune as left over of what it can, where it does not raise."""
    made = L0Module(CONFIG, pruning_type=pruning_type)
    for loga in made.z_logas.values():
        loga.data.fill_(50.0)
    _, sparsity, _ = made.lagrangian_regularization(0)
    # without the biases, which the sizes of heads and dimensions leave out in part, nothing is pruned
    assert 0 <= sparsity.item() < 0.3
    report = made.calculate_model_size(made(training=False))
    assert 0 <= report["remaining_params"] <= made.prunable_model_size
