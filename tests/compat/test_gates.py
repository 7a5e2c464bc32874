"""The published gates: names, shapes, numbers and gradients as published, on the fused operations."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

from diffmask_fast.compat.diffmask import (
    DiffMaskGateHidden,
    DiffMaskGateInput,
    MLPGate,
    MLPMaxGate,
    PerSampleDiffMaskGate,
    PerSampleREINFORCEGate,
)
from diffmask_fast.ops import draw_seed, uniforms

B, T, H, A, L = 2, 5, 6, 4, 3
EPS64 = torch.finfo(torch.float64).eps
NAMES = ("new_state", "gates", "expected_L0", "gates_full", "expected_L0_full")


def states_of(dtype: torch.dtype = torch.float32, layers: int = L) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, T, H, generator=generator).to(dtype) for _ in range(layers)]


def made(cls: Any, **settings: Any) -> Any:
    """A gate with the parameters of a gate in training: far from where they start."""
    torch.manual_seed(0)
    gate = cls(H, A, L, **({"max_position_embeddings": 1} | settings))
    with torch.no_grad():
        for name, parameter in gate.named_parameters():
            if "weight" in name:
                parameter.mul_(3)
            elif name.endswith("bias"):
                parameter.sub_(4)
    return gate


def called(gate: nn.Module, *arguments: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(9)
    return gate(*arguments)


def uniforms_of(*shape: int) -> Tensor:
    """What `gate_mix` draws in `called`."""
    torch.manual_seed(9)
    return uniforms(draw_seed(), math.prod(shape)).view(shape)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], atol: float) -> None:
    for name, g, w in zip(NAMES, got, want, strict=False):
        assert g.shape == w.shape, name
        torch.testing.assert_close(g.double(), w.double(), rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def weighed(results: tuple[Tensor, ...]) -> Tensor:
    """One number that all results count in, each of their elements differently."""
    total: Any = 0
    for i, result in enumerate(results):
        total = total + (result * torch.linspace(0.3 + i, 1.0, result.numel()).view_as(result).to(result)).sum()
    return total


def gradients(gate: nn.Module, states: list[Tensor], results: tuple[Tensor, ...]) -> list[Tensor]:
    wanted = [*gate.parameters(), *states]
    grads = torch.autograd.grad(weighed(results), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def parity(gate: nn.Module, spelled: Any, states: list[Tensor], arguments: tuple[Any, ...], atol: float) -> None:
    """Outputs, and gradients for every parameter and state, are those of the plain spelling."""
    for state in states:
        state.requires_grad_()
    got = called(gate, states, *arguments)
    parameters = dict(gate.named_parameters()) | dict(gate.named_buffers())
    want = spelled(parameters, states)
    same(got, want, atol)
    for g, w in zip(gradients(gate, states, got), gradients(gate, states, want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=10 * atol)


@pytest.mark.parametrize("layer_pred", [0, 2, None])
@pytest.mark.parametrize("gate_bias", [True, False])
@pytest.mark.parametrize("placeholder", [True, False])
@pytest.mark.parametrize(("gate_fn", "bound"), [(MLPGate, None), (MLPMaxGate, 10.0)])
def test_input_gate_is_the_published_formula(gate_fn, bound, placeholder, gate_bias, layer_pred) -> None:
    gate = made(DiffMaskGateInput, gate_fn=gate_fn, gate_bias=gate_bias, placeholder=placeholder).double()
    u = uniforms_of(B, T, L if layer_pred is None else layer_pred + 1).double()

    def spelled(parameters: Any, states: Any) -> tuple[Tensor, ...]:
        return plain.input_gate(parameters, states, layer_pred, u, bound, eps=EPS64)

    # float64's rounding, some hundred operations of it; probabilities up to 1 - e^-14 lose six digits on the way.
    parity(gate, spelled, states_of(torch.float64), (None, layer_pred), 1e-9)


@pytest.mark.parametrize("layer_pred", [0, 2])
@pytest.mark.parametrize("placeholder", [True, False])
@pytest.mark.parametrize(("gate_fn", "bound"), [(MLPGate, None), (MLPMaxGate, 10.0)])
def test_hidden_gate_is_the_published_formula(gate_fn, bound, placeholder, layer_pred) -> None:
    gate = made(DiffMaskGateHidden, gate_fn=gate_fn, placeholder=placeholder).double()
    u = uniforms_of(B, T, 1).double()

    def spelled(parameters: Any, states: Any) -> tuple[Tensor, ...]:
        return plain.hidden_gate(parameters, states, layer_pred, u, bound, eps=EPS64)

    parity(gate, spelled, states_of(torch.float64), (None, layer_pred), 1e-9)


def test_hidden_gate_of_all_layers_mixes_layer_0_and_returns_every_gate() -> None:
    gate = made(DiffMaskGateHidden, placeholder=True).double()
    torch.manual_seed(9)
    u = torch.rand(B, T, L, dtype=torch.float64)

    def spelled(parameters: Any, states: Any) -> tuple[Tensor, ...]:
        return plain.hidden_gate(parameters, states, None, u, eps=EPS64)

    parity(gate, spelled, states_of(torch.float64), (None, None), 1e-9)


def test_per_sample_gate_is_the_published_formula() -> None:
    torch.manual_seed(0)
    gate = PerSampleDiffMaskGate(H, L, T, batch_size=B, placeholder=True).double()
    gate.logits.data = torch.randn(B, T, L, dtype=torch.float64) * 3
    torch.manual_seed(9)
    u = torch.rand(B, T, L, dtype=torch.float64)

    def spelled(parameters: Any, states: Any) -> tuple[Tensor, ...]:
        return plain.per_sample_gate(parameters, states, 1, u, eps=EPS64)

    parity(gate, spelled, states_of(torch.float64), (None, 1), 1e-9)


@pytest.mark.parametrize("cls", [DiffMaskGateInput, DiffMaskGateHidden])
def test_float32_is_the_published_formula_but_for_rounding(cls: Any) -> None:
    gate = made(cls, placeholder=True)
    got = called(gate, states_of(), None, 2)
    parameters = {name: value.double() for name, value in gate.state_dict().items()}
    spelled = plain.input_gate if cls is DiffMaskGateInput else plain.hidden_gate
    want = spelled(
        parameters, states_of(torch.float64), 2, uniforms_of(B, T, 3 if cls is DiffMaskGateInput else 1).double()
    )
    # Logits up to 15 of a few dozen products are off by 2e-5; the gate's slope is 1.5, three gates multiply, and what
    # they mix differs by 4 at most.
    same(got, want, 4 * 3 * 1.5 * 2e-5)


class Given(nn.Module):
    """A gate function of the user's, of logits that are there already."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(B, T, 1))

    def forward(self, *args: Tensor) -> Tensor:
        return self.logits


EXTREMES = [(DiffMaskGateInput, logit) for logit in (-90.0, -17.0, 15.8, 17.0, math.inf)]


@pytest.mark.parametrize(("cls", "logit"), [*EXTREMES, (DiffMaskGateHidden, 17.0)])
def test_extreme_logits_are_clipped_as_published_in_output_and_gradient(cls: Any, logit: float) -> None:
    """It takes a million gates to meet the uniforms to which a clipped logit makes a difference."""
    many = 2**20
    gate = cls(1, 1, 1, 1, gate_fn=Given, placeholder=True)
    gate.g_hat[0].logits = nn.Parameter(torch.full((1, many, 1), logit))
    state = torch.randn(1, many, 1)
    new, gates, _, _, opened = called(gate, [state], None, 0)
    wide = torch.full((1, many, 1), logit, dtype=torch.float64, requires_grad=True)
    placeholder = gate.placeholder[0][None] if cls is DiffMaskGateHidden else gate.placeholder
    placeholder = placeholder.detach().double().view(1, 1, 1)
    want = plain.input_masking(state.double(), wide, placeholder, uniforms_of(1, many, 1).double())
    # See ROUNDING in test_distributions.py; states differ from the placeholder by 8 at most.
    same((new, gates), (want[0], want[1]), 8 * 2e-5)
    if logit > 16:  # without clipping they would be other gates
        unclipped = plain.draw(
            uniforms_of(1, many, 1).double(), wide, plain.TEMPERATURE, plain.LEFT, plain.RIGHT, 1e-15
        )
        assert (unclipped - want[3]).abs().max() > 5 * 2e-5
    got_grad = torch.autograd.grad(gates.sum(), gate.g_hat[0].logits, retain_graph=True)[0]
    want_grad = torch.autograd.grad(want[1].sum(), wide)[0]
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=0, atol=2e-5)
    assert got_grad.eq(0).all() == (abs(logit) > 16)
    # The log of P(gate != 0) is of the logit as it is, and has its gradient.
    slope = torch.autograd.grad(opened.sum(), gate.g_hat[0].logits)[0]
    assert slope.gt(1 - 1e-6).all() if logit < 0 else slope.lt(1e-6).all()


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (DiffMaskGateInput, ["placeholder"]),
        (DiffMaskGateHidden, ["placeholder.0", "placeholder.1", "placeholder.2"]),
    ],
)
def test_keys_of_the_state_dict_are_the_published_ones(cls: Any, keys: list[str]) -> None:
    found = set(made(cls, gate_fn=MLPMaxGate, placeholder=True).state_dict())
    layers = {"f.0.weight_g", "f.0.weight_v", "f.0.bias", "f.2.weight_g", "f.2.weight_v", "f.2.bias", "bias"}
    assert found == {f"g_hat.{i}.{name}" for i in range(L) for name in layers} | set(keys)


def test_without_gate_bias_the_last_layer_has_none() -> None:
    found = set(made(DiffMaskGateHidden, gate_fn=MLPGate, gate_bias=False).state_dict())
    layers = {"f.0.weight_g", "f.0.weight_v", "f.0.bias", "f.2.weight_g", "f.2.weight_v"}
    assert found == {f"g_hat.{i}.{name}" for i in range(L) for name in layers} | {"placeholder"}


def old_weight_norm(bias: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm = torch.nn.utils.weight_norm
        return nn.Sequential(norm(nn.Linear(2 * H, A)), nn.Tanh(), norm(nn.Linear(A, 1, bias=bias)))


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_start_and_stand_as_those_of_the_old_weight_norm(bias: bool) -> None:
    """Their order is that in which an optimiser's state is kept."""
    torch.manual_seed(3)
    ours = MLPGate(2 * H, A, bias).f
    torch.manual_seed(3)
    theirs = old_weight_norm(bias)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, got), (_, want) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(got, torch.full_like(want, 5.0) if name == "2.bias" else want)


def test_parameters_of_the_new_weight_norm_load_too() -> None:
    new = nn.utils.parametrizations.weight_norm
    theirs = nn.Sequential(new(nn.Linear(H, A)), nn.Tanh(), new(nn.Linear(A, 1)))
    ours = MLPGate(H, A)
    before = dict(theirs.state_dict())
    ours.f.load_state_dict(before)
    assert before.keys() == theirs.state_dict().keys()  # the caller's dict is left alone
    x = torch.randn(7, H)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.f(x), theirs(x))


def test_a_gate_can_be_copied() -> None:
    """With the old weight_norm that raises once it has run."""
    gate = made(DiffMaskGateInput)
    called(gate, states_of(), None, 1)
    same(called(copy.deepcopy(gate), states_of(), None, 1), called(gate, states_of(), None, 1), 0)


def test_networks_concatenate_whatever_they_are_given() -> None:
    x, y = torch.randn(3, H), torch.randn(3, 2)
    gate = MLPMaxGate(H + 2, A, 7)
    assert gate.max_activation == 7
    want = plain.network(dict(gate.named_parameters()), "", torch.cat([x, y], -1), 7.0, "bias")
    torch.testing.assert_close(gate(x, y), want)
    assert gate(torch.randn(2, 3, 4, H + 2)).shape == (2, 3, 4, 1)


def test_a_subclass_with_a_forward_of_its_own_is_called() -> None:
    class Doubled(MLPMaxGate):
        def forward(self, *args: Tensor) -> Tensor:
            return 2 * super().forward(*args)

    gate = made(DiffMaskGateInput, gate_fn=Doubled)
    plainly = made(DiffMaskGateInput)
    twice = called(gate, states_of(), None, None)[4]
    once = [2 * g(states_of()[0], s) for g, s in zip(plainly.g_hat, states_of(), strict=True)]
    want = plain.log_nonzero(torch.cat(once, -1).double(), 0.2, -0.2, 1.0).cumsum(-1)
    torch.testing.assert_close(twice.double(), want, rtol=1e-5, atol=1e-5)


def test_the_placeholder_starts_as_the_vector_given_at_every_position() -> None:
    vector = torch.randn(3, H, requires_grad=True)[1]  # a row of an embedding
    for placeholder in (
        made(DiffMaskGateInput, placeholder=True, init_vector=vector, max_position_embeddings=4).placeholder,
        *made(DiffMaskGateHidden, placeholder=True, init_vector=vector, max_position_embeddings=4).placeholder,
    ):
        assert isinstance(placeholder, nn.Parameter) and placeholder.is_leaf
        assert placeholder.shape == (1, 4, H) and (placeholder == vector).all()
    # For per-sample gates the published code took L vectors alone, and raised for the one that the others take.
    for given in (vector, vector.expand(L, H)):
        gate = PerSampleDiffMaskGate(H, L, T, B, placeholder=True, init_vector=given)
        assert gate.placeholder.shape == (B, L, T, H) and (gate.placeholder == vector).all()


def test_a_placeholder_of_many_positions_is_cut_to_the_text() -> None:
    gate = made(DiffMaskGateInput, placeholder=True, max_position_embeddings=T + 3)
    new, gates, *_ = called(gate, states_of(), None, 2)
    want = plain.mixed(states_of()[0], gates, gate.placeholder)
    torch.testing.assert_close(new, want)


def test_the_mask_is_ignored() -> None:
    gate = made(DiffMaskGateInput)
    with_mask = called(gate, states_of(), torch.zeros(B, T), 1)
    same(with_mask, called(gate, states_of(), None, 1), 0)
    torch.manual_seed(9)
    same(gate(hidden_states=tuple(states_of()), mask=None, layer_pred=torch.tensor(1)), with_mask, 0)


def test_bfloat16_states_stay_so_and_gates_are_float32() -> None:
    for cls in (DiffMaskGateInput, DiffMaskGateHidden):
        for layer_pred in (1, None):
            results = called(made(cls, placeholder=True), states_of(torch.bfloat16), None, layer_pred)
            assert [r.dtype for r in results] == [torch.bfloat16] + [torch.float32] * 4


def test_reinforce_gates_are_0_or_1_and_their_logs_are_there_under_validation() -> None:
    """The published gate calls log_prob(1.0), which torch refuses while it validates."""
    gate = PerSampleREINFORCEGate(H, L, T, batch_size=B, placeholder=True)
    gate.logits.data = torch.randn(B, T, L)
    new, gates, opened, gates_full, opened_full = called(gate, states_of(), None, 2)
    torch.manual_seed(9)
    assert torch.equal(gates_full, torch.distributions.Bernoulli(logits=gate.logits).sample())
    torch.testing.assert_close(opened_full, torch.nn.functional.logsigmoid(gate.logits))
    assert torch.equal(gates, gates_full[..., 2]) and torch.equal(opened, opened_full[..., 2])
    assert torch.equal(new, torch.where(gates[..., None] == 1, states_of()[2], gate.placeholder[:, 2]))
    assert gates_full.grad_fn is None and opened_full.requires_grad


@pytest.mark.parametrize("cls", [PerSampleDiffMaskGate, PerSampleREINFORCEGate])
def test_per_sample_gates_take_shorter_texts_and_no_layer(cls: Any) -> None:
    """The published ones raise for both."""
    gate = cls(H, L, T + 4, batch_size=B)
    new, gates, opened, gates_full, opened_full = called(gate, states_of(), None, None)
    assert new.shape == (B, T, H) and gates.shape == opened.shape == (B, T)
    assert gates_full.shape == opened_full.shape == (B, T, L)
    assert torch.equal(gates, gates_full[..., 0])


def test_a_per_sample_gate_of_one_example_is_shared_by_a_batch() -> None:
    gate = PerSampleDiffMaskGate(H, L, T)
    gate.logits.data.zero_()
    new, gates, *_ = called(gate, states_of(), None, 1)
    assert gates.shape == (1, T) and new.shape == (B, T, H)
    torch.testing.assert_close(new, states_of()[1] * gates[..., None])


@pytest.mark.parametrize("cls", [DiffMaskGateInput, DiffMaskGateHidden])
def test_minus_one_is_the_last_layer(cls: Any) -> None:
    gate = made(cls)
    same(called(gate, states_of(), None, -1), called(gate, states_of(), None, L - 1), 0)


@pytest.mark.parametrize("make", [DiffMaskGateInput, DiffMaskGateHidden, PerSampleDiffMaskGate])
def test_what_does_not_fit_is_refused_with_the_numbers(make: Any) -> None:
    gate = PerSampleDiffMaskGate(H, L, T, B) if make is PerSampleDiffMaskGate else made(make)
    with pytest.raises(ValueError, match="layer_pred is 3; with 3 states and 3 layers expected 0 to 2"):
        gate(states_of(), None, 3)
    with pytest.raises(ValueError, match="4 states and this gate 3 layers"):
        gate(states_of(layers=4), None, None)
    with pytest.raises(ValueError, match=r"hidden_states\[0\] is 7 wide; this gate was made for 6"):
        gate([torch.zeros(B, T, 7)] * 3, None, 1)
    with pytest.raises(TypeError):
        gate(states_of(), None, 1.5)


def test_a_per_sample_gate_refuses_another_batch() -> None:
    gate = PerSampleDiffMaskGate(H, L, T, batch_size=3)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 6\).*batches of 3 and 5 positions"):
        gate(states_of(), None, 0)


def test_logits_that_are_not_numbers_are_refused() -> None:
    gate = made(DiffMaskGateInput)
    states = states_of()
    states[1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="logits must be finite"):
        gate(states, None, 2)
