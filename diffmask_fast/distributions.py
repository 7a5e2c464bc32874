"""The Hard Concrete law as a member of `torch.distributions`: exact zeros, and gradients through them.

A binary concrete variable s, stretched to (left, right) and clamped to [0, 1] (Louizos et al., ICLR 2018,
section 2.3; De Cao et al., EMNLP 2020, appendix B):

    s = sigmoid((log u - log(1 - u) + logit) / temperature),    u ~ U(0, 1)
    z = clamp(left + (right - left) * s, 0, 1)

Everything below follows from one closed form, the chance that z lies above v:

    P(z > v) = sigmoid(logit - temperature * log((v - left) / (right - v))),    0 <= v < 1

`diffmask_fast.ops.gate_mix` draws the same law, fused with the mixing of states; this class is for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid

from diffmask_fast.ops.reference import LEFT, RIGHT, TEMPERATURE, hard_concrete, log_open

# Tanh-sinh rule (Takahasi and Mori, 1974) on [0, 1]. Its outermost points lie 1e-21 from the ends: what is
# cut off is below float64's resolution.
_STEP = 1 / 16
_POINTS_EACH_SIDE = 55


class _Finite(constraints.Constraint):
    """Finite values that meet `bound` too: torch's own constraints let infinities pass."""

    def __init__(self, bound: constraints.Constraint) -> None:
        self.bound = bound
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return self.bound.check(value) & value.isfinite()

    def __repr__(self) -> str:
        return f"Finite({self.bound!r})"


class HardConcrete(Distribution):
    """Hard Concrete distribution over [0, 1], with an atom at 0 and, where `right > 1`, another at 1.

    The four parameters are numbers or floating-point tensors and broadcast to `batch_shape`; `event_shape` is
    `()`. They take the logits' dtype and device (the first tensor's when logits is a number); half precision
    is computed, and returned, as float32.

    Args:
        logits: location of the gate, finite. A larger logit opens the gate.
        temperature: > 0. As it goes to 0, z becomes a Bernoulli variable with these logits.
        left: < 0. How far below 0 the variable is stretched; makes the atom at 0.
        right: >= 1. At exactly 1 (the default, De Cao et al., 2020) there is no atom at 1.
        validate_args: as in every torch distribution; None takes torch's default, which is to check.

    Raises:
        TypeError: a parameter is neither a number nor a floating-point tensor.
        ValueError: shapes that don't broadcast; under validation, a parameter that is not finite or out of
            its range, or a value outside [0, 1] given to `log_prob`, `cdf` or `icdf`.

    With `right == 1` many samples of an open gate are closer to 1 than floating point can tell, in float32
    most of them, and come out as 1.0. The law has no mass there, so `log_prob` is -inf: to score samples,
    choose `right > 1`. Under a `TransformedDistribution`, log_prob scales the atoms by the Jacobian too,
    which they should be spared; samples and cdf are right.

    Example:
        >>> gate = HardConcrete(torch.tensor([-5.0, 0.0, 5.0]))
        >>> gate.rsample((4,)).shape
        torch.Size([4, 3])
        >>> gate.prob_open
        tensor([0.0092, 0.5798, 0.9951])
    """

    arg_constraints = {  # noqa: RUF012 (the base class declares it as a property)
        "logits": _Finite(constraints.real),
        "temperature": _Finite(constraints.positive),
        "left": _Finite(constraints.less_than(0.0)),
        "right": _Finite(constraints.greater_than_eq(1.0)),
    }
    support = constraints.unit_interval
    has_rsample = True

    logits: Tensor
    temperature: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        logits: Tensor | float,
        temperature: Tensor | float = TEMPERATURE,
        left: Tensor | float = LEFT,
        right: Tensor | float = RIGHT,
        validate_args: bool | None = None,
    ) -> None:
        given = {"logits": logits, "temperature": temperature, "left": left, "right": right}
        self.logits, self.temperature, self.left, self.right = _broadcast(given)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: HardConcrete | None = None) -> HardConcrete:
        """The same law with its parameters expanded to `batch_shape`; nothing is copied."""
        new = self._get_checked_instance(HardConcrete, _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(HardConcrete, new).__init__(Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparametrised samples, shape `sample_shape + batch_shape`, from torch's global generator.

        The gradient is that of the clamped expression: zero where z is clamped. `sample` is it, detached.
        """
        shape = self._extended_shape(Size(sample_shape))
        # (k + 1/2) eps with k below 1 / eps: exact, symmetric about 1/2, and never 0 as torch.rand can be.
        eps = torch.finfo(self.logits.dtype).eps
        k = torch.randint(round(1 / eps), shape, dtype=self.logits.dtype, device=self.logits.device)
        uniforms = (k + 0.5) * eps
        return hard_concrete(uniforms, self.logits, self.temperature, self.left, self.right)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log of the mixed law, shape: `value` broadcast with `batch_shape`.

        The log of the atom's mass at exactly 0 and at exactly 1 (-inf there if `right == 1`); in between, the
        log density of the stretched binary concrete; outside [0, 1], ValueError under validation, else -inf.
        """
        if self._validate_args:
            self._validate_sample(value)
        # Branches that torch.where throws away must still be finite, or their gradients are NaN.
        inner = torch.where((value <= 0) | (value >= 1), 0.5, value)
        from_left, to_right = inner - self.left, self.right - inner
        above = self._logit_above(from_left, to_right)
        slope = self.temperature * (self.right - self.left) / (from_left * to_right)
        log_density = logsigmoid(above) + logsigmoid(-above) + slope.log()

        log_zero = logsigmoid(-self._logit_above(-self.left, self.right))
        beyond_one = torch.where(self.right > 1, self.right - 1, 1)
        log_one = logsigmoid(self._logit_above(1 - self.left, beyond_one))
        log_one = torch.where(self.right > 1, log_one, -math.inf)

        mixed = torch.where(value == 0, log_zero, torch.where(value == 1, log_one, log_density))
        return torch.where((value < 0) | (value > 1), -math.inf, mixed)

    def cdf(self, value: Tensor) -> Tensor:
        """P(z <= value), right-continuous: it starts at P(z = 0) and jumps to 1 at 1 if there is an atom."""
        if self._validate_args:
            self._validate_sample(value)
        inner = torch.where((value < 0) | (value >= 1), 0.5, value)
        below = torch.sigmoid(-self._logit_above(inner - self.left, self.right - inner))
        return torch.where(value < 0, 0.0, torch.where(value >= 1, 1.0, below))

    def icdf(self, value: Tensor) -> Tensor:
        """The smallest z with `cdf(z) >= value`, for value in [0, 1]: what `rsample` makes of a uniform."""
        if self._validate_args:
            self._validate_sample(value)
        return hard_concrete(value, self.logits, self.temperature, self.left, self.right)

    @property
    def log_open(self) -> Tensor:
        """log P(z != 0), shape `batch_shape` (Louizos et al., 2018, equation 12, as a log)."""
        return log_open(self.logits, self.temperature, self.left, self.right)

    @property
    def prob_open(self) -> Tensor:
        """P(z != 0), shape `batch_shape`: the attribution of a position."""
        return self.log_open.exp()

    @property
    def mean(self) -> Tensor:
        """E[z], shape `batch_shape`, differentiable; no sampling.

        The integral of P(z > v) over v in [0, 1]. It has no closed form, so it is computed by a fixed rule.
        Relative error in float64, left <= -0.01: rounding alone for temperatures up to 1, 1e-10 up to 2, 1e-4
        at 10, where the law is steep. In float32, some roundings of the logit.
        """
        from_left, to_right, weights = self._quadrature()
        return (weights * torch.sigmoid(self._logit_above(from_left, to_right))).sum(0)

    @property
    def variance(self) -> Tensor:
        """Var[z], shape `batch_shape`, differentiable; by the same rule as `mean`.

        E[x^2] - E[x]^2 for x = z or x = 1 - z, whichever is the smaller on average, so that little cancels
        where z is nearly always 1: the error is relative to that E[x^2].
        """
        from_left, to_right, weights = self._quadrature()
        above = self._logit_above(from_left, to_right)
        mostly_open = (weights * torch.sigmoid(above)).sum(0) > 0.5
        tail = torch.sigmoid(torch.where(mostly_open, -above, above))
        x = torch.where(mostly_open, to_right + (1 - self.right), from_left + self.left)
        return (weights * 2 * x * tail).sum(0) - (weights * tail).sum(0).square()

    def _logit_above(self, from_left: Tensor, to_right: Tensor) -> Tensor:
        """Logit of P(z > v), given v - left and right - v: v alone can't tell how close to right it is."""
        return self.logits - self.temperature * (from_left.log() - to_right.log())

    def _quadrature(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points and weights for integrals over v in [0, 1]: v - left, right - v and the weights.

        Each has the points along a first dimension and broadcasts with `batch_shape` behind it. P(z > v) ends
        in the power (1 - v)^temperature where right is 1, on which Gauss rules converge slowly; a tanh-sinh
        rule doesn't mind what happens at an end.
        """
        t = torch.arange(-_POINTS_EACH_SIDE, _POINTS_EACH_SIDE + 1, dtype=torch.float64) * _STEP
        t = t.reshape(-1, *[1] * self.logits.dim())
        from_zero, to_one = torch.sigmoid(math.pi * t.sinh()), torch.sigmoid(-math.pi * t.sinh())
        weights = math.pi * _STEP * t.cosh() * from_zero * to_one
        from_zero, to_one, weights = (part.to(self.logits) for part in (from_zero, to_one, weights))
        return from_zero - self.left, to_one + (self.right - 1), weights


def _broadcast(given: dict[str, Tensor | float]) -> tuple[Tensor, ...]:
    """The parameters as tensors of one floating dtype (float32 at least), device and shape."""
    for name, value in given.items():
        if not (isinstance(value, float | int) or (isinstance(value, Tensor) and value.is_floating_point())):
            came = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"HardConcrete: {name} is {came}; pass a number or a floating-point tensor")
    first = next((value for value in given.values() if isinstance(value, Tensor)), torch.empty(()))
    dtype = torch.promote_types(first.dtype, torch.float32)
    tensors = [torch.as_tensor(value, dtype=dtype, device=first.device) for value in given.values()]
    try:
        return torch.broadcast_tensors(*tensors)
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(given, tensors, strict=True))
        raise ValueError(f"HardConcrete: the parameters' shapes don't broadcast: {shapes}") from error
