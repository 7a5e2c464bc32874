"""The Hard Concrete of GraphMask (Schlichtkrull et al., ICLR 2021), by its name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmask_fast.compat.rules import straight_through
from diffmask_fast.ops.reference import hard_concrete, log_open

EPSILON = 1e-6


class HardConcrete(nn.Module):
    """Gates 0 or 1 for logits, with the gradient of the Hard Concrete gates that they are the roundings of.

    Args:
        beta: temperature.
        gamma, zeta: what gates are stretched to; gamma < 0 < zeta.
        fix_temp: whether the temperature is a number; else it is a parameter.
        loc_bias: what is added to logits, so that gates start open.
    """

    def __init__(
        self, beta: float = 1 / 3, gamma: float = -0.2, zeta: float = 1.0, fix_temp: bool = True, loc_bias: float = 3
    ) -> None:
        super().__init__()
        self.temp = beta if fix_temp else nn.Parameter(torch.full((1,), beta))
        self.gamma = gamma
        self.zeta = zeta
        self.gamma_zeta_ratio = math.log(-gamma / zeta)
        self.loc_bias = loc_bias

    def forward(self, input_element: Tensor, summarize_penalty: bool = True) -> tuple[Tensor, Tensor]:
        """Gates of logits of any shape, and the penalty: P(z != 0) in training, averaged if asked to; else 0.

        In evaluation no gate is sampled, and none knows the temperature.
        """
        logits = input_element + self.loc_bias
        if self.training:
            uniforms = torch.empty_like(logits).uniform_(EPSILON, 1 - EPSILON)
            gate = hard_concrete(uniforms, logits, self.temp, self.gamma, self.zeta)
            penalty = log_open(logits, self.temp, self.gamma, self.zeta).exp()
        else:
            gate = hard_concrete(torch.full_like(logits, 0.5), logits, 1.0, self.gamma, self.zeta)
            penalty = torch.zeros_like(logits)
        return straight_through(gate), penalty.mean() if summarize_penalty else penalty
