"""Each project's way to evaluate without sampling, and GraphMask's gates."""

from __future__ import annotations

import math

import plain
import pytest
import torch

from diffmask_fast.compat.graphmask import HardConcrete
from diffmask_fast.compat.rules import evaluate, straight_through

LOGITS = torch.tensor([-6.0, -1.0, -0.2, 0.1, 0.3, 2.0, 6.0])


def test_expected_is_the_mean_of_samples() -> None:
    u = torch.rand(100_000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = plain.draw(u, LOGITS.double(), 2 / 3, -0.1, 1.1).mean(0)
    # Five standard deviations, 1/2 at most, of the mean of 100,000.
    torch.testing.assert_close(evaluate(LOGITS, "expected").double(), want, rtol=0, atol=5 * 0.5 / 100_000**0.5)


def test_sigmoid_clamp_stretches_the_sigmoid() -> None:
    want = [min(max(1.2 / (1 + math.exp(-x)) - 0.1, 0.0), 1.0) for x in LOGITS.tolist()]
    assert evaluate(LOGITS, "sigmoid-clamp").tolist() == pytest.approx(want, abs=1e-6)
    assert want[0] == 0 and want[-1] == 1


def test_top_k_sets_to_zero_as_many_as_are_expected_to_be() -> None:
    closed = (1 - plain.log_nonzero(LOGITS.double(), 2 / 3, -0.1, 1.1).exp()).sum().item()
    soft = [1 / (1 + math.exp(-x * 1.5 * 0.8)) for x in LOGITS.tolist()]
    assert round(closed) == 2
    want = [0.0, 0.0, *soft[2:]]
    assert evaluate(LOGITS, "top-k").tolist() == pytest.approx(want, abs=1e-6)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.equal(evaluate(LOGITS[order].view(7, 1), "top-k").flatten(), evaluate(LOGITS, "top-k")[order])


def test_top_k_takes_a_number_of_zeros_and_a_factor() -> None:
    assert evaluate(LOGITS, "top-k", zeros=5).count_nonzero() == 2
    assert torch.equal(evaluate(LOGITS, "top-k", zeros=0, factor=2 / 3), torch.sigmoid(LOGITS))
    assert evaluate(torch.tensor(-5.0), "top-k") == 0
    with pytest.raises(ValueError, match="zeros is 8, expected 0 to 7"):
        evaluate(LOGITS, "top-k", zeros=8)


def test_straight_through_rounds_and_keeps_the_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    gates = evaluate(logits, "straight-through")
    assert gates.tolist() == [0, 0, 0, 1, 1, 1, 1]
    grad = torch.autograd.grad(gates.sum(), logits)[0]
    assert torch.equal(grad, torch.autograd.grad(evaluate(logits, "sigmoid-clamp").sum(), logits)[0])
    assert grad[2] > 0 and grad[0] == 0


def test_round_is_the_same_without_a_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    gates = evaluate(logits, "round")
    assert gates.tolist() == [0, 0, 0, 1, 1, 1, 1] and not gates.requires_grad


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule is 'mean', expected one of expected, sigmoid-clamp"):
        evaluate(LOGITS, "mean")


@pytest.mark.parametrize("fix_temp", [True, False])
def test_graphmask_in_training_is_the_published_formula(fix_temp: bool) -> None:
    gate = HardConcrete(fix_temp=fix_temp)
    x = (torch.arange(-60, 61) / 8).requires_grad_()
    torch.manual_seed(0)
    z, penalty = gate(x)
    torch.manual_seed(0)
    u = torch.empty(121).uniform_(1e-6, 1 - 1e-6).double()
    wide = (x.detach().double() + 3).requires_grad_()
    temperature = torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True)
    s = torch.sigmoid((u.log() - (1 - u).log() + wide) / temperature)
    soft = (s * 1.2 - 0.2).clamp(0, 1)
    assert torch.equal(z, (soft > 0.5).float())
    want_penalty = torch.sigmoid(wide - temperature * math.log(0.2)).mean()
    torch.testing.assert_close(penalty.double(), want_penalty)
    leaves = [x] if fix_temp else [x, gate.temp]
    got = torch.autograd.grad((z.sum() + penalty), leaves)
    want = torch.autograd.grad(soft.sum() + want_penalty, [wide, temperature])
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g.double().sum_to_size(g.shape), w.reshape(g.shape), rtol=1e-4, atol=1e-4)
    assert (gate.temp.shape == (1,)) if not fix_temp else gate.temp == 1 / 3


def test_graphmask_in_evaluation_is_the_rounded_sigmoid_without_temperature_or_penalty() -> None:
    gate = HardConcrete().eval()
    x = torch.linspace(-6, 2, 33)
    z, penalty = gate(x, summarize_penalty=False)
    assert torch.equal(z, (torch.sigmoid(x + 3) * 1.2 - 0.2 > 0.5).float())
    assert torch.equal(penalty, torch.zeros_like(x)) and gate(x)[1].shape == ()
    assert torch.equal(z, evaluate(x + 3, "straight-through", left=-0.2, right=1.0))
    assert (gate.gamma, gate.zeta, gate.loc_bias) == (-0.2, 1.0, 3)
    assert gate.gamma_zeta_ratio == pytest.approx(math.log(0.2))


def test_straight_through_of_a_gate_at_one_half_is_0() -> None:
    assert straight_through(torch.tensor([0.5, 0.6])).tolist() == [0.0, 1.0]
