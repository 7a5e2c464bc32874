"""The distributions of the published DiffMask code, by its names, as full members of `torch.distributions`.

`BinaryConcrete` is a relaxed Bernoulli variable on (0, 1), `Streched` stretches one to (l, r), `RectifiedStreched`
clamps that to [0, 1]: the Hard Concrete (Louizos et al., ICLR 2018, section 2.3; De Cao et al., EMNLP 2020,
appendix B). All "expected L0" are of P(value > 0), and `log_` ones are its log.

As published, samples clip probabilities to [eps, 1 - eps] of their dtype, so a logit beyond +-15.94 in float32 counts
as +-15.94 and gets no gradient, while `log_expected_L0` takes it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import AffineTransform, Distribution, RelaxedBernoulli, TransformedDistribution
from torch.distributions.utils import clamp_probs

from diffmask_fast.ops.reference import gate_dtype, hard_concrete, log_open


def clip_logits(logits: Tensor) -> Tensor:
    """The logits that samples are made from: +-log((1 - eps) / eps) at most, without gradient beyond.

    Half precision is clipped where float32 is, in which its gates are computed.
    """
    eps = torch.finfo(gate_dtype(logits)).eps
    limit = math.log1p(-eps) - math.log(eps)
    return logits.clamp(-limit, limit)


class BinaryConcrete(RelaxedBernoulli):
    """Binary concrete distribution on (0, 1) (Maddison et al., ICLR 2017).

    Args:
        temperature: > 0, a number or a tensor that broadcasts with the logits.
        logits: floating point; they and the temperature broadcast to `batch_shape`.
        validate_args: as in every torch distribution.
    """

    def __init__(self, temperature: Tensor | float, logits: Tensor | float, validate_args: bool | None = None) -> None:
        at = logits if isinstance(logits, Tensor) else torch.tensor(float(logits))
        temperatures, at = torch.broadcast_tensors(torch.as_tensor(temperature, dtype=at.dtype, device=at.device), at)
        super().__init__(temperature=temperatures, logits=at, validate_args=validate_args)
        self.device = at.device

    def expand(self, batch_shape: Sequence[int], _instance: BinaryConcrete | None = None) -> BinaryConcrete:
        new = self._get_checked_instance(BinaryConcrete, _instance)
        new.device = self.device
        return super().expand(batch_shape, _instance=new)

    def cdf(self, value: Tensor | float) -> Tensor:
        """P(s <= value), 0 below the interval and 1 above."""
        inside = self._as_value(value).clamp(0, 1)
        return torch.sigmoid((inside.log() - (-inside).log1p()) * self.temperature - self.logits)

    def log_prob(self, value: Tensor | float) -> Tensor:
        """The log density, -inf outside (0, 1)."""
        value = self._as_value(value)
        inside = (value > 0) & (value < 1)
        # What torch.where throws away must be in the support, and finite, or it raises or its gradient is NaN.
        return torch.where(inside, super().log_prob(torch.where(inside, value, 0.5)), -math.inf)

    def log_expected_L0(self, value: Tensor | float) -> Tensor:  # noqa: N802
        """log P(s > value), for value in (0, 1)."""
        value = self._as_value(value)
        return log_open(self.logits, self.temperature, -value, 1 - value)

    def _as_value(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.logits.dtype, device=self.device)


class Streched(TransformedDistribution):
    """`l + (r - l) * s` for s from `base_dist`."""

    def __init__(
        self,
        base_dist: Distribution,
        l: float = -0.1,  # noqa: E741 (the published name)
        r: float = 1.1,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(base_dist, AffineTransform(loc=l, scale=r - l), validate_args=validate_args)

    @property
    def bounds(self) -> tuple[float, float]:
        """(l, r)"""
        affine: Any = self.transforms[-1]
        return affine.loc, affine.loc + affine.scale

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Streched:
        new = self._get_checked_instance(type(self), _instance)
        return super().expand(Size(batch_shape), _instance=new)

    def log_expected_L0(self) -> Tensor:  # noqa: N802
        """log P(value > 0), shape `batch_shape`."""
        left, right = self.bounds
        base: Any = self.base_dist
        return base.log_expected_L0(-left / (right - left))

    def expected_L0(self) -> Tensor:  # noqa: N802
        """P(value > 0), shape `batch_shape`."""
        return self.log_expected_L0().exp()


class RectifiedStreched(Streched):
    """A stretched variable clamped to [0, 1]: over a `BinaryConcrete`, the Hard Concrete.

    `log_prob` and `cdf` are those of `Streched`, as published; `diffmask_fast.HardConcrete` has the mixed law.
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples, shape `sample_shape + batch_shape`, from the uniforms that the published code would draw."""
        base = self.base_dist
        if not isinstance(base, BinaryConcrete):
            return super().rsample(Size(sample_shape)).clamp(0, 1)
        logits = clip_logits(base.logits)
        uniforms = torch.rand(self._extended_shape(Size(sample_shape)), dtype=logits.dtype, device=logits.device)
        return hard_concrete(clamp_probs(uniforms), logits, base.temperature, *self.bounds)
