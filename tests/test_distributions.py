"""HardConcrete against the exact law, spelled here once more with scipy's logistic noise.

A sample is zero, one or below v exactly when the noise log u - log(1 - u) is below a threshold, so that every
probability here is a value of `scipy.stats.logistic`. Statistical tests have a fixed seed; over all seeds, a
test fails a correct sampler with probability ALPHA (Bonferroni over its positions).
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import AffineTransform, Independent, TransformedDistribution

from diffmask_fast.distributions import HardConcrete
from diffmask_fast.ops.reference import hard_concrete

ALPHA = 1e-4
SAMPLES = 100_000
LAWS = [(0.2, -0.2, 1.0), (2 / 3, -0.1, 1.1), (1 / 3, -0.2, 1.0)]
LOGITS = torch.linspace(-4, 4, 9, dtype=torch.float64)
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: "{:.2f},{},{}".format(*law))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(20)
        yield


def noise_at(law: tuple[float, float, float], v: float | np.ndarray) -> np.ndarray:
    """Noise plus logit that makes the stretched variable equal v; infinite at v = right."""
    temperature, left, right = law
    with np.errstate(divide="ignore"):
        return temperature * np.log((np.asarray(v) - left) / (right - np.asarray(v)))


def exact_below(law: tuple[float, float, float], v: float) -> np.ndarray:
    """P(z <= v) for 0 <= v < 1, at every position of LOGITS."""
    return stats.logistic.cdf(noise_at(law, v), loc=LOGITS.numpy())


def smallest_p_value(counts: np.ndarray, chances: np.ndarray) -> float:
    """Two-sided binomial test at each position, corrected for their number."""
    p_values = [stats.binomtest(int(k), SAMPLES, float(p)).pvalue for k, p in zip(counts, chances, strict=True)]
    return min(p_values) * len(p_values)


# ---- samples


@every_law
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_position_is_zero_as_often_as_the_law_says(law, dtype):
    z = HardConcrete(LOGITS.to(dtype), *law).sample((SAMPLES,))
    assert smallest_p_value((z == 0).sum(0).numpy(), exact_below(law, 0.0)) > ALPHA


@every_law
def test_zeros_over_all_positions_are_as_many_as_the_law_says(law):
    zeros = int((HardConcrete(LOGITS, *law).sample((SAMPLES,)) == 0).sum())
    chance = exact_below(law, 0.0)
    spread = math.sqrt(SAMPLES * (chance * (1 - chance)).sum())
    assert abs(zeros - SAMPLES * chance.sum()) < stats.norm.isf(ALPHA / 2) * spread


@every_law
def test_each_position_is_one_or_next_to_it_as_often_as_the_law_says(law):
    edge = 1 - 1e-6
    z = HardConcrete(LOGITS, *law).sample((SAMPLES,))
    assert smallest_p_value((z > edge).sum(0).numpy(), 1 - exact_below(law, edge)) > ALPHA


def test_each_position_is_exactly_one_as_often_as_the_atom_says_when_right_is_above_one():
    law = (2 / 3, -0.1, 1.1)
    z = HardConcrete(LOGITS, *law).sample((SAMPLES,))
    assert smallest_p_value((z == 1).sum(0).numpy(), 1 - exact_below(law, 1.0)) > ALPHA


@every_law
def test_samples_between_the_atoms_follow_the_law(law):
    edge = 0.999  # so that what is left is continuous in floating point too
    z = HardConcrete(LOGITS, *law).sample((SAMPLES,))
    below_zero, below_edge = exact_below(law, 0.0), exact_below(law, edge)
    for i, logit in enumerate(LOGITS.tolist()):
        inner = z[:, i][(z[:, i] > 0) & (z[:, i] < edge)].numpy()

        def conditional(v, i=i, logit=logit):
            below = stats.logistic.cdf(noise_at(law, v), loc=logit)
            return (below - below_zero[i]) / (below_edge[i] - below_zero[i])

        assert stats.kstest(inner, conditional).pvalue * len(LOGITS) > ALPHA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lowest_and_the_highest_uniform_are_inside_the_open_interval(dtype, monkeypatch):
    gate = HardConcrete(torch.zeros(2, dtype=dtype), temperature=40.0, left=-0.01)

    def both_ends(high, size, **options):
        return torch.tensor([0, high - 1], **options)

    monkeypatch.setattr(torch, "randint", both_ends)
    low, high = gate.sample().tolist()
    # A uniform of 0 or 1 gives z = 0 or 1 at any temperature; at this one, half a step off gives neither.
    assert 0 < low < high < 1


def test_the_same_seed_gives_the_same_samples():
    gate = HardConcrete(LOGITS)
    first, other = (torch.manual_seed(3), gate.sample((5,)))[1], gate.sample((5,))
    torch.manual_seed(3)
    assert torch.equal(gate.sample((5,)), first)
    assert not torch.equal(other, first)


def test_sample_is_detached_and_rsample_is_not():
    gate = HardConcrete(LOGITS.clone().requires_grad_())
    assert not gate.sample().requires_grad
    assert gate.rsample().requires_grad


# ---- densities and probabilities


@every_law
def test_cdf_is_the_law_of_the_thresholded_noise(law):
    gate = HardConcrete(LOGITS, *law)
    for v in [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 2**-53]:
        # The logit's terms are below 16, so its rounding errors move a probability by some 16 eps of itself.
        below = gate.cdf(torch.tensor(v, dtype=torch.float64))
        np.testing.assert_allclose(below, exact_below(law, v), rtol=128 * np.finfo(float).eps)


@every_law
def test_cdf_is_one_at_one_and_zero_below_zero(law):
    gate = HardConcrete(LOGITS, *law, validate_args=False)
    assert (gate.cdf(torch.tensor(1.0)) == 1).all()
    assert (gate.cdf(torch.tensor(7.0)) == 1).all()
    assert (gate.cdf(torch.tensor(-1e-9)) == 0).all()


@every_law
def test_the_atom_at_zero_and_the_density_integrate_to_the_cdf(law):
    for logit in LOGITS[::2]:
        gate = HardConcrete(logit, *law)
        for v in [0.05, 0.5, 0.95]:
            mass, error = integrate.quad(
                lambda x, gate=gate: gate.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item(), 0, v
            )
            total = gate.log_prob(torch.tensor(0.0)).exp() + mass
            assert abs(total - gate.cdf(torch.tensor(v, dtype=torch.float64))) < error + 1e-13


def test_both_atoms_and_the_density_have_mass_one_when_right_is_above_one():
    for logit in LOGITS:
        gate = HardConcrete(logit, 2 / 3, -0.1, 1.1)
        inner, error = integrate.quad(
            lambda x, gate=gate: gate.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item(), 0, 1
        )
        atoms = gate.log_prob(torch.tensor([0.0, 1.0])).exp().sum()
        assert abs(atoms + inner - 1) < error + 1e-13


def test_one_has_no_mass_when_right_is_one():
    log_one = HardConcrete(LOGITS).log_prob(torch.tensor(1.0))
    assert (log_one == -math.inf).all()


@pytest.mark.parametrize("value", [-0.5, 1.0, 1.5])
def test_where_log_prob_is_minus_infinity_its_gradients_are_zero_and_not_nan(value):
    parameters = [torch.tensor(number, requires_grad=True) for number in (0.5, 0.2, -0.2, 1.0)]
    log_prob = HardConcrete(*parameters, validate_args=False).log_prob(torch.tensor(value))
    assert log_prob == -math.inf
    log_prob.backward()
    assert [parameter.grad.item() for parameter in parameters] == [0, 0, 0, 0]


@every_law
def test_icdf_undoes_cdf_between_the_atoms(law):
    gate = HardConcrete(LOGITS, *law)
    v = torch.linspace(0.01, 0.95, 20, dtype=torch.float64)[:, None]
    probability = gate.cdf(v)
    # cdf is only known to some 16 eps; dv / dcdf = 1 / density tells what that means for v.
    tolerance = 64 * torch.finfo(torch.float64).eps * (1 + 1 / gate.log_prob(v).exp())
    assert ((gate.icdf(probability) - v).abs() < tolerance).all()


@every_law
def test_icdf_is_zero_up_to_the_atom_of_zero_and_one_at_one(law):
    gate = HardConcrete(LOGITS, *law)
    atom = gate.cdf(torch.tensor(0.0))
    assert (gate.icdf(atom * (1 - 1e-12)) == 0).all()
    assert (gate.icdf(atom + 1e-9 * (1 - atom)) > 0).all()
    assert (gate.icdf(torch.zeros_like(LOGITS)) == 0).all()
    assert (gate.icdf(torch.ones_like(LOGITS)) == 1).all()


@every_law
def test_log_open_is_the_log_chance_of_not_being_zero(law):
    gate = HardConcrete(LOGITS, *law)
    expected = stats.logistic.logsf(noise_at(law, 0.0), loc=LOGITS.numpy())
    np.testing.assert_allclose(gate.log_open, expected, rtol=128 * np.finfo(float).eps)
    np.testing.assert_allclose(gate.prob_open, 1 - exact_below(law, 0.0), rtol=128 * np.finfo(float).eps)


# ---- moments


def moment_by_quadrature(law: tuple[float, float, float], logit: float, power: int) -> float:
    """E[z^power] as an integral over the noise; smooth in it, so that quad is good to 1e-13."""
    temperature, left, right = law
    start, end = noise_at(law, 0.0), noise_at(law, 1.0)

    def term(a: float) -> float:
        z = left + (right - left) / (1 + math.exp(-a / temperature))
        return z**power * stats.logistic.pdf(a, loc=logit)

    knots = np.concatenate([[start], np.arange(math.ceil(start), min(end, 45.0)), [min(end, 45.0)]])
    pieces = [integrate.quad(term, a, b, epsabs=1e-15, epsrel=1e-13)[0] for a, b in itertools.pairwise(knots)]
    return math.fsum(pieces) + stats.logistic.sf(min(end, 45.0), loc=logit)


@every_law
def test_mean_and_variance_are_the_integrals_over_the_noise(law):
    gate = HardConcrete(LOGITS[::2], *law)
    for i, logit in enumerate(LOGITS[::2].tolist()):
        mean = moment_by_quadrature(law, logit, 1)
        assert gate.mean[i].item() == pytest.approx(mean, rel=1e-11)
        # The difference of two moments below 1 carries their 1e-13, whatever the variance is.
        variance = moment_by_quadrature(law, logit, 2) - mean**2
        assert gate.variance[i].item() == pytest.approx(variance, rel=0, abs=1e-12)


@pytest.mark.parametrize("law", [(2.0, -0.01, 1.0), (0.02, -0.2, 1.0), (1.0, -0.2, 1.0), (0.2, -3.0, 4.0)])
def test_mean_is_right_for_unusual_laws_too(law):
    gate = HardConcrete(LOGITS[::4], *law)
    expected = [moment_by_quadrature(law, logit, 1) for logit in LOGITS[::4].tolist()]
    np.testing.assert_allclose(gate.mean, expected, rtol=1e-10 if law[0] > 1 else 1e-11)


@every_law
def test_mean_is_that_of_the_samples(law):
    gate = HardConcrete(LOGITS, *law)
    off = gate.sample((SAMPLES,)).mean(0) - gate.mean
    standard_error = (gate.variance / SAMPLES).sqrt()
    assert (off.abs() < stats.norm.isf(ALPHA / 2 / len(LOGITS)) * standard_error).all()


@every_law
def test_float32_moments_and_log_probs_differ_from_float64_by_rounding_only(law):
    # The same parameters to the last bit: left and temperature are rounded to float32 first.
    narrow = HardConcrete(LOGITS.float(), *law)
    wide = HardConcrete(*(getattr(narrow, name).double() for name in ("logits", "temperature", "left", "right")))
    # A logit's terms are below 4 + 20 * temperature; one ulp of them is this much of a probability or log.
    ulp = torch.finfo(torch.float32).eps * (4 + 20 * law[0])
    torch.testing.assert_close(narrow.mean.double(), wide.mean, rtol=2 * ulp, atol=0)
    # A difference of two moments, with both their roundings.
    moments = wide.variance + 2 * torch.minimum(wide.mean, 1 - wide.mean).square()
    assert ((narrow.variance - wide.variance).abs() < 2 * ulp * moments).all()
    value = torch.tensor([0.0, 0.25, 0.75])[:, None]
    log_prob = narrow.log_prob(value).double()
    torch.testing.assert_close(log_prob, wide.log_prob(value.double()), rtol=2 * ulp, atol=2 * ulp)


@every_law
def test_far_logits_have_finite_moments_and_gradients(law):
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    temperature = torch.full((4,), law[0], requires_grad=True)
    gate = HardConcrete(logits, temperature, *law[1:])
    value = torch.tensor([0.0, 0.3, 1.0])[:, None]
    inside = gate.log_prob(value[:2]).sum() + gate.log_open.sum() + gate.mean.sum() + gate.variance.sum()
    (inside + gate.rsample().sum() + gate.cdf(value).sum()).backward()
    assert inside.isfinite()
    assert logits.grad.isfinite().all()
    assert temperature.grad.isfinite().all()
    # 1 can be missed by the roundings of a sum of 111 weights.
    torch.testing.assert_close(gate.mean, torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-6)


# ---- gradients, by central differences in float64


def free_parameters(law: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return LOGITS.clone().requires_grad_(), torch.full_like(LOGITS, law[0]).requires_grad_()


@every_law
def test_gradients_of_log_prob(law):
    value = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)[:, None].requires_grad_()
    assert gradcheck(lambda g, t, v: HardConcrete(g, t, *law[1:]).log_prob(v), (*free_parameters(law), value))
    atoms = torch.tensor([0.0] if law[2] == 1 else [0.0, 1.0])[:, None]
    assert gradcheck(lambda g, t: HardConcrete(g, t, *law[1:]).log_prob(atoms), free_parameters(law))


@every_law
def test_gradients_of_log_open_and_cdf(law):
    value = torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)[:, None]
    assert gradcheck(lambda g, t: HardConcrete(g, t, *law[1:]).log_open, free_parameters(law))
    assert gradcheck(lambda g, t: HardConcrete(g, t, *law[1:]).cdf(value), free_parameters(law))


@every_law
def test_gradients_of_mean_and_variance_to_second_order(law):
    for moment in ("mean", "variance"):

        def at(logits, temperature, moment=moment):
            return getattr(HardConcrete(logits, temperature, *law[1:]), moment)

        assert gradcheck(at, free_parameters(law))
        assert gradgradcheck(at, free_parameters(law))


@every_law
def test_gradients_of_rsample_with_the_noise_held(law):
    def draw(logits, temperature):
        torch.manual_seed(7)
        return HardConcrete(logits, temperature, *law[1:]).rsample((8,))

    z = draw(LOGITS, torch.full_like(LOGITS, law[0]))
    inner = (z > 0) & (z < 1)
    # gradcheck moves a logit by 1e-6: no sample may cross a kink on the way. Both sides of it are looked at.
    assert z[inner].min() > 1e-4
    assert inner.any()
    assert not inner.all()
    assert gradcheck(draw, free_parameters(law))


# ---- a torch distribution like any other


def test_samples_and_log_probs_have_the_shapes_of_torch_distributions():
    gate = HardConcrete(torch.zeros(4, 1), torch.full((3,), 0.5))
    assert gate.batch_shape == (4, 3)
    assert gate.event_shape == ()
    assert gate.sample().shape == (4, 3)
    assert gate.rsample((2, 5)).shape == (2, 5, 4, 3)
    assert gate.log_prob(torch.rand(2, 1, 3)).shape == (2, 4, 3)
    assert gate.mean.shape == gate.variance.shape == gate.log_open.shape == gate.stddev.shape == (4, 3)


def test_plain_numbers_make_a_scalar_distribution():
    gate = HardConcrete(5)
    assert gate.batch_shape == ()
    assert gate.sample().dtype == torch.get_default_dtype()
    # -temperature * log(-left / right), 0.3219, is the offset that the paper's numbers have.
    assert gate.prob_open.item() == pytest.approx(1 / (1 + math.exp(-5 - 0.2 * math.log(5))), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    gate = HardConcrete(torch.tensor([-1.0, 2.0], dtype=dtype))
    assert gate.sample().dtype == gate.log_open.dtype == gate.mean.dtype == torch.float32


def test_expand_keeps_the_law_and_copies_nothing():
    logits = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    gate = HardConcrete(logits, 0.5)
    wide = gate.expand((3, 2, 4))
    assert isinstance(wide, HardConcrete)
    assert wide.batch_shape == (3, 2, 4)
    assert wide.logits.data_ptr() == logits.data_ptr()
    assert torch.equal(wide.log_open, gate.log_open.expand(3, 2, 4))
    assert wide.rsample().requires_grad


def test_expand_keeps_whether_values_are_validated():
    outside = torch.tensor(2.0)
    with pytest.raises(ValueError, match="within the support"):
        HardConcrete(0.0, validate_args=True).expand((3,)).log_prob(outside)
    unchecked = HardConcrete(0.0, validate_args=False).expand((3,))
    assert (unchecked.log_prob(outside) == -math.inf).all()


def test_independent_sums_the_log_probs():
    gate = HardConcrete(torch.zeros(2, 3))
    value = torch.tensor([0.0, 0.25, 0.5])
    joint = Independent(gate, 1)
    assert joint.event_shape == (3,)
    torch.testing.assert_close(joint.log_prob(value), gate.log_prob(value).sum(-1))
    assert joint.rsample((7,)).shape == (7, 2, 3)


def test_a_transformed_gate_has_the_transformed_samples_and_cdf():
    gate = HardConcrete(torch.zeros(3))
    shifted = TransformedDistribution(gate, AffineTransform(1.0, 2.0))
    torch.manual_seed(5)
    z = gate.sample((4,))
    torch.manual_seed(5)
    torch.testing.assert_close(shifted.sample((4,)), 1 + 2 * z)
    torch.testing.assert_close(shifted.cdf(torch.tensor(1.5)), gate.cdf(torch.tensor(0.25)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_a_copied_or_pickled_gate_draws_the_same(copied):
    gate = HardConcrete(LOGITS, 2 / 3, -0.1, 1.1)
    twin = copied(gate)
    torch.manual_seed(9)
    z = gate.sample((6,))
    torch.manual_seed(9)
    assert torch.equal(twin.sample((6,)), z)


# ---- wrong input


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"logits": torch.tensor([0.0, math.nan])}, "logits"),
        ({"logits": torch.tensor([0.0, math.inf])}, "logits"),
        ({"logits": -math.inf}, "logits"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -0.2}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"left": 0.0}, "left"),
        ({"left": -math.inf}, "left"),
        ({"right": 0.9}, "right"),
        ({"right": math.inf}, "right"),
    ],
)
def test_a_parameter_out_of_its_range_is_named(wrong, named):
    with pytest.raises(ValueError, match=f"Expected parameter {named} .* to satisfy the constraint Finite"):
        HardConcrete(**{"logits": 0.0, **wrong})


@pytest.mark.parametrize("logits", [torch.tensor([1, 2]), "5", None, [0.0, 1.0]])
def test_logits_that_are_not_floating_point_are_a_type_error(logits):
    with pytest.raises(TypeError, match=r"logits is .*; pass a number or a floating-point tensor"):
        HardConcrete(logits)


def test_shapes_that_do_not_broadcast_are_told():
    with pytest.raises(ValueError, match=r"logits \(2,\), temperature \(3,\)"):
        HardConcrete(torch.zeros(2), torch.ones(3))


@pytest.mark.parametrize("method", ["log_prob", "cdf", "icdf"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_value_outside_the_support_is_an_error_under_validation(method, value):
    with pytest.raises(ValueError, match="within the support"):
        getattr(HardConcrete(0.0), method)(torch.tensor(value))


def test_a_value_outside_the_support_has_log_prob_minus_infinity_without_validation():
    gate = HardConcrete(0.0, validate_args=False)
    assert (gate.log_prob(torch.tensor([-0.1, 1.1])) == -math.inf).all()


def test_samples_equal_the_reference_gate_of_the_same_uniforms():
    gate = HardConcrete(LOGITS, 1 / 3, -0.2, 1.0)
    uniforms = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    # icdf is the sampler: what it makes of a uniform is the gate that gate_mix's oracle makes of it.
    expected = hard_concrete(uniforms, LOGITS, 1 / 3, -0.2, 1.0)
    torch.testing.assert_close(gate.icdf(uniforms), expected, rtol=4 * torch.finfo(torch.float64).eps, atol=0)
