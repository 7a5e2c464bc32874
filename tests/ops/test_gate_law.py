"""The gates that gate_mix draws follow the Hard Concrete law, as `HardConcrete` has it in float64.

The seed is fixed; over all seeds, a test fails correct gates with probability ALPHA (Bonferroni).
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffmask_fast.distributions import HardConcrete
from diffmask_fast.ops import gate_mix
from diffmask_fast.ops.backends import available

ALPHA = 1e-4
SAMPLES = 100_000
LAWS = [(0.2, -0.2, 1.0), (2 / 3, -0.1, 1.1), (1 / 3, -0.2, 1.0)]
LOGITS = torch.linspace(-4, 4, 9)
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: "{:.2f},{},{}".format(*law))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = available()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def draw(logits: Tensor, law: tuple[float, float, float], backend: str) -> tuple[Tensor, Tensor]:
    """Running gates and running log_open of SAMPLES rows of positions, whose logits are (positions, K)."""
    temperature, left, right = law
    rows = logits.expand(SAMPLES, *logits.shape)
    result = gate_mix(
        torch.ones(SAMPLES, len(logits), 1),
        rows.contiguous(),
        torch.zeros(1),
        torch.tensor([20, 0]),
        temperature=temperature,
        left=left,
        right=right,
        backend=backend,
    )
    return result.gates, result.log_open


def smallest_p_value(counts: Tensor, chances: Tensor) -> float:
    """Two-sided binomial test at each position, corrected for their number."""
    pairs = zip(counts.tolist(), chances.tolist(), strict=True)
    return min(stats.binomtest(count, SAMPLES, chance).pvalue for count, chance in pairs) * len(counts)


def exact(law: tuple[float, float, float]) -> HardConcrete:
    return HardConcrete(LOGITS.double(), *law)


@every_law
def test_each_position_is_zero_as_often_as_the_law_says(law, backend):
    gates = draw(LOGITS[:, None], law, backend)[0][..., 0]
    assert smallest_p_value((gates == 0).sum(0), 1 - exact(law).prob_open) > ALPHA


@every_law
def test_zeros_over_all_positions_are_as_many_as_the_law_says(law, backend):
    zeros = int((draw(LOGITS[:, None], law, backend)[0] == 0).sum())
    chance = 1 - exact(law).prob_open
    spread = math.sqrt(SAMPLES * (chance * (1 - chance)).sum())
    assert abs(zeros - SAMPLES * chance.sum()) < stats.norm.isf(ALPHA / 2) * spread


@every_law
def test_gates_between_the_atoms_follow_the_law(law, backend):
    edge = torch.tensor(0.99, dtype=torch.float64)  # float32 has few numbers left beyond it
    gates = draw(LOGITS[:, None], law, backend)[0][..., 0].double()
    for i, logit in enumerate(LOGITS.double()):
        gate = HardConcrete(logit, *law)
        below_zero, below_edge = gate.cdf(torch.zeros(())), gate.cdf(edge)
        inner = gates[:, i][(gates[:, i] > 0) & (gates[:, i] < edge)]
        # Uniform on (0, 1) if the gates follow the law.
        quantiles = (gate.cdf(inner) - below_zero) / (below_edge - below_zero)
        assert stats.kstest(quantiles.numpy(), "uniform").pvalue * len(LOGITS) > ALPHA


@every_law
def test_gates_close_to_one_are_as_many_as_the_law_says(law, backend):
    edge = 0.99
    gates = draw(LOGITS[:, None], law, backend)[0][..., 0]
    chance = 1 - exact(law).cdf(torch.tensor(edge, dtype=torch.float64))
    assert smallest_p_value((gates > edge).sum(0), chance) > ALPHA


@every_law
def test_the_product_of_three_gates_is_open_as_often_as_log_open_says(law, backend):
    logits = torch.stack([LOGITS, LOGITS.flip(0) + 2, torch.ones_like(LOGITS)], dim=-1)
    gates, log_open = draw(logits, law, backend)
    for k in range(3):
        assert smallest_p_value((gates[..., k] != 0).sum(0), log_open[0, :, k].double().exp()) > ALPHA
