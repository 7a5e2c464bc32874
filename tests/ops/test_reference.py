from __future__ import annotations

import math

import pytest
import torch

from diffmask_fast.ops import gate_mix, reference

LAWS = [(0.2, -0.2, 1.0), (2 / 3, -0.1, 1.1), (1 / 3, -0.2, 1.0)]


@pytest.mark.parametrize("law", LAWS)
def test_gate_is_the_formula_of_the_paper(law):
    temperature, left, right = law
    for u in (1e-6, 0.1, 0.5, 0.77, 1 - 1e-6):
        for logit in (-3.0, 0.0, 2.5):
            s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + logit) / temperature))
            expected = min(1.0, max(0.0, left + (right - left) * s))
            u64, logit64 = torch.tensor(u, dtype=torch.float64), torch.tensor(logit, dtype=torch.float64)
            gate = reference.hard_concrete(u64, logit64, *law)
            # the noise's condition at u = 1 - 1e-6 turns an eps of u into 1e6 eps
            assert gate.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_probability_of_an_open_gate_is_the_share_of_uniforms_that_open_it(law):
    logits = torch.linspace(-2, 2, 9, dtype=torch.float64)
    n = 200_000
    grid = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    share = (reference.hard_concrete(grid, logits, *law) > 0).double().mean(0)
    # A grid of n points counts an interval to within one point.
    assert (reference.log_open(logits, *law).exp() - share).abs().max() <= 1 / n


@pytest.mark.parametrize("baseline", [(5,), (3, 5), (1, 3, 5), (2, 1, 5), (2, 3, 5)])
def test_backward_is_the_gradient_of_forward(case, baseline):
    states, logits, baseline, seed = case((2, 3), 5, 4, baseline, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: tuple(gate_mix(*inputs, seed)), (states, logits, baseline))


def test_backward_matches_autograd_where_several_gates_are_exactly_zero(case):
    states, logits, baseline, seed = case((40,), 3, 6, dtype=torch.float64)
    inputs = (states, logits, baseline)
    law = (0.2, -0.2, 1.0)

    def by_autograd():
        u = reference.philox_uniforms(seed, logits.numel()).view(logits.shape).double()
        gates = reference.hard_concrete(u, logits).cumprod(-1)
        return (
            gates[..., -1:] * states + (1 - gates[..., -1:]) * baseline,
            gates,
            reference.log_open(logits).cumsum(-1),
        )

    plain = by_autograd()
    assert ((plain[1] == 0).sum(-1) > 1).any()
    grads = [torch.randn_like(output) for output in plain]
    expected = torch.autograd.grad(plain, inputs, grads)
    ours = reference.gate_mix_backward(*grads, *(t.detach() for t in inputs), seed, *law, True, True)
    for name, mine, theirs in zip(("states", "logits", "baseline"), ours, expected, strict=True):
        # Both are float64 with fewer than a hundred operations for a value.
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
