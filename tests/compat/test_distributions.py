"""The published distributions: the same numbers from the same uniforms, and full members of torch.distributions."""

from __future__ import annotations

import math

import plain
import pytest
import torch
from torch import Tensor

from diffmask_fast.compat.diffmask import BinaryConcrete, RectifiedStreched, Streched

LAWS = [(0.2, -0.2, 1.0), (1 / 3, -0.2, 1.0), (2 / 3, -0.1, 1.1)]
LIMIT = math.log((1 - plain.EPS) / plain.EPS)
# A logit up to 16 and a logit of a uniform up to 16 are rounded four times in float32, to half of 2^-19 each at most:
# an error of 4e-6, which the slope of the gate, at most 1.2 / 0.2 / 4, makes 6e-6, and that of its gradient, at most
# 1.2 / 0.2^2 / 10, 1.2e-5. Torch's own relaxed sample also stays an eps below 1.
ROUNDING = 2e-5


def rectified(logits: Tensor, temperature: float = 0.2, left: float = -0.2, right: float = 1.0) -> RectifiedStreched:
    return RectifiedStreched(BinaryConcrete(torch.full_like(logits, temperature), logits), l=left, r=right)


def uniforms_of(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(shape, dtype=dtype)


def sampled(seed: int, law: RectifiedStreched, shape: tuple[int, ...] = ()) -> Tensor:
    torch.manual_seed(seed)
    return law.rsample(shape)


@pytest.mark.parametrize("law", LAWS)
def test_a_sample_is_the_published_formula_of_the_uniforms_that_torch_draws(law: tuple[float, float, float]) -> None:
    logits = torch.linspace(-14, 14, 57)
    got = sampled(3, rectified(logits, *law), (500,))
    want = plain.draw(uniforms_of(3, (500, 57)).double(), logits.double(), *law)
    assert 0 < (want == 0).double().mean() < 1
    torch.testing.assert_close(got.double(), want, rtol=0, atol=ROUNDING)


def test_in_float64_a_sample_is_the_published_formula_to_the_last_digits() -> None:
    logits = torch.linspace(-14, 14, 57, dtype=torch.float64)
    eps = torch.finfo(torch.float64).eps
    want = plain.draw(uniforms_of(3, (500, 57), torch.float64), logits, *LAWS[0], eps=eps)
    # The published way takes a logit up to 14 through a sigmoid and back: an error of eps e^14 = 3e-10.
    torch.testing.assert_close(sampled(3, rectified(logits), (500,)), want, rtol=0, atol=1e-9)


def test_a_sample_equals_what_the_chain_of_torch_distributions_gives() -> None:
    logits = torch.linspace(-3, 3, 31)
    base = torch.distributions.RelaxedBernoulli(torch.full_like(logits, 0.2), logits=logits)
    chain = torch.distributions.TransformedDistribution(base, torch.distributions.AffineTransform(-0.2, 1.2))
    torch.manual_seed(5)
    want = chain.rsample((400,)).clamp(0, 1)
    torch.testing.assert_close(sampled(5, rectified(logits), (400,)), want, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("law", LAWS)
def test_the_gradient_is_the_published_one(law: tuple[float, float, float]) -> None:
    logits = torch.linspace(-14, 14, 57).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got = torch.autograd.grad(sampled(4, rectified(logits, *law), (50,)).mul(torch.arange(57)).sum(), logits)[0]
    out = plain.draw(uniforms_of(4, (50, 57)).double(), wide, *law)
    want = torch.autograd.grad(out.mul(torch.arange(57)).sum(), wide)[0]
    assert want.abs().max() > 1
    # 50 samples, each weighed by 56 at most.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=50 * 56 * ROUNDING)


@pytest.mark.parametrize("beyond", [LIMIT + 0.5, 20.0, 90.0, math.inf])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_logit_beyond_the_limit_counts_as_the_limit_and_gets_no_gradient(sign: int, beyond: float) -> None:
    logits = torch.full((2000,), sign * beyond, requires_grad=True)
    at_limit = torch.full((2000,), sign * LIMIT)
    gates = sampled(6, rectified(logits))
    assert torch.equal(gates, sampled(6, rectified(at_limit)))
    want = plain.draw(uniforms_of(6, (2000,)).double(), logits.detach().double(), *LAWS[0])
    torch.testing.assert_close(gates.double(), want, rtol=0, atol=ROUNDING)
    assert torch.autograd.grad(gates.sum(), logits)[0].eq(0).all()


def test_below_the_limit_there_is_a_gradient() -> None:
    logits = torch.full((100_000,), -LIMIT + 0.5, requires_grad=True)
    assert torch.autograd.grad(sampled(7, rectified(logits + 12)).sum(), logits)[0].abs().sum() > 0
    clipped = torch.tensor([-LIMIT + 0.5, LIMIT - 0.5], requires_grad=True)
    from diffmask_fast.compat.distributions import clip_logits

    assert torch.equal(torch.autograd.grad(clip_logits(clipped).sum(), clipped)[0], torch.ones(2))


@pytest.mark.parametrize("law", LAWS)
def test_the_log_of_the_expected_l0_is_the_published_one_and_not_clipped(law: tuple[float, float, float]) -> None:
    logits = torch.linspace(-80, 80, 161)
    got = rectified(logits, *law).log_expected_L0()
    want = plain.log_nonzero(logits.double(), *law)
    # A logit up to 80 and its shift are rounded once each; the log has a slope of 1 at most.
    torch.testing.assert_close(got.double(), want, rtol=2**-22, atol=2**-22)
    torch.testing.assert_close(rectified(logits, *law).expected_L0(), got.exp())


def test_gates_that_start_at_5_are_open_as_the_paper_says() -> None:
    law = rectified(torch.tensor([5.0, -5.0, 0.0]))
    assert [round(p, 4) for p in law.expected_L0().tolist()] == [0.9951, 0.0092, 0.5798]


def test_the_cdf_is_that_of_the_samples() -> None:
    law = Streched(BinaryConcrete(torch.tensor(0.7), torch.tensor(0.3)), l=-0.2, r=1.0)
    torch.manual_seed(0)
    drawn = law.rsample((40_000,))
    for value in (-0.1, 0.0, 0.4, 0.9):
        # Five standard deviations of a mean of 40,000.
        assert abs((drawn <= value).float().mean() - law.cdf(torch.tensor(value))) < 5 * 0.5 / 200


def test_outside_the_interval_log_prob_is_minus_infinity_and_the_cdf_0_or_1() -> None:
    """Under torch's validation of values, the published code raises here."""
    law = BinaryConcrete(torch.tensor(0.2), torch.tensor(1.0))
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])
    assert law.log_prob(values).isinf().tolist() == [True, True, False, True, True]
    torch.testing.assert_close(law.cdf(values), torch.tensor([0.0, 0.0, torch.sigmoid(torch.tensor(-1.0)), 1.0, 1.0]))
    logits = torch.tensor(1.0, requires_grad=True)
    BinaryConcrete(torch.tensor(0.2), logits).log_prob(values)[2].backward()
    assert logits.grad is not None and logits.grad.isfinite()


def test_log_prob_is_the_derivative_of_the_cdf() -> None:
    law = BinaryConcrete(0.6, torch.tensor(0.4, dtype=torch.float64))
    value = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    density = torch.autograd.grad(law.cdf(value).sum(), value)[0]
    torch.testing.assert_close(law.log_prob(value).exp(), density)


@pytest.mark.parametrize(
    "make", [Streched, RectifiedStreched, lambda base: base], ids=["streched", "rectified", "base"]
)
def test_they_expand_and_take_sample_shapes(make) -> None:
    """The published classes raise NotImplementedError when they are expanded."""
    law = make(BinaryConcrete(torch.full((3,), 0.2), torch.tensor([-1.0, 0.0, 2.0]))).expand((4, 3))
    assert type(law) is type(make(BinaryConcrete(0.2, torch.zeros(3))))
    assert law.batch_shape == (4, 3) and law.rsample((5, 2)).shape == (5, 2, 4, 3)
    if isinstance(law, Streched):
        assert law.log_expected_L0().shape == (4, 3) and law.bounds == pytest.approx((-0.1, 1.1))


def test_a_sample_without_gradient_is_the_same_sample() -> None:
    law = rectified(torch.zeros(9, requires_grad=True))
    torch.manual_seed(1)
    drawn = law.sample((7,))
    assert not drawn.requires_grad and torch.equal(drawn, sampled(1, law, (7,)))


def test_numbers_and_any_rank_of_logits_are_taken() -> None:
    assert rectified(torch.tensor(1.0)).rsample().shape == ()
    assert rectified(torch.zeros(2, 3, 4, 5, 6)).rsample().shape == (2, 3, 4, 5, 6)
    assert BinaryConcrete(0.2, 1.0).device == torch.device("cpu")


def test_another_base_distribution_is_stretched_and_clamped() -> None:
    law = RectifiedStreched(torch.distributions.Kumaraswamy(torch.tensor(0.5), torch.tensor(0.5)))
    torch.manual_seed(0)
    drawn = law.rsample((1000,))
    assert drawn.min() == 0 and drawn.max() == 1


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="logits"):
        rectified(torch.tensor([0.0, math.nan]))
