"""Hard Concrete gates of pruning code, by their names: L0_regularization (Louizos et al., ICLR 2018), CoFi and
LLM-Shearing (Xia et al., ACL 2022, ICLR 2024), Edge-Pruning and PruLong (Bhaskar et al., 2024, 2025) and
subnetwork-probing (Cao et al., NAACL 2021).

Same names, arguments, uniforms and numbers as published, on the one law of `diffmask_fast.ops.reference`. Uniforms are
drawn where the logits are: on a GPU the published code draws them on the CPU and waits for the copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.utils import _pair

from diffmask_fast.compat.distributions import BinaryConcrete
from diffmask_fast.compat.rules import FACTOR, evaluate
from diffmask_fast.ops.reference import hard_concrete, log_open, stretched_concrete

LIMIT_LEFT, LIMIT_RIGHT = -0.1, 1.1
EPS = 1e-6
TEMPERATURE = 2 / 3
limit_a, limit_b, epsilon = LIMIT_LEFT, LIMIT_RIGHT, EPS
LOWEST, HIGHEST = math.log(1e-2), math.log(1e2)


def cdf_stretched_concrete(x: float, log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """P(stretched variable <= x), kept away from 0 and 1; at x = 0, that of a gate that is 0."""
    return BinaryConcrete(temperature, log_alpha).cdf((x - LIMIT_LEFT) / (LIMIT_RIGHT - LIMIT_LEFT)).clamp(EPS, 1 - EPS)


def sample_z_from_u(u: Tensor, log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The stretched variable of uniforms, not yet clamped."""
    return stretched_concrete(u, log_alpha, temperature, LIMIT_LEFT, LIMIT_RIGHT)


def uniforms(shape: Sequence[int], device: torch.device, eps: float = EPS) -> Tensor:
    """Uniform numbers in [eps, 1 - eps), float32, from the global generator."""
    return torch.empty(*shape, device=device).uniform_(eps, 1 - eps)


def sample_z_from_log_alpha(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Gates of logits of any shape."""
    u = uniforms(log_alpha.shape, log_alpha.device)
    return hard_concrete(u, log_alpha, temperature, LIMIT_LEFT, LIMIT_RIGHT)


def deterministic_z_from_log_alpha(log_alpha: Tensor, apply_one: bool = False) -> Tensor:
    """The rule "top-k" of `evaluate`; with `apply_one`, and where any gate is 0, those that are not are 1."""
    z = evaluate(log_alpha, "top-k", temperature=TEMPERATURE)
    return (z > 0).to(z) if apply_one and bool((z == 0).any()) else z


class _Gated(nn.Module):
    """What the layers of L0_regularization share: a gate for each of some units of `weights`."""

    temperature: float
    prior_prec: float
    lamba: float

    def _start(self, weights: Sequence[int], units: int, outputs: int, bias: bool, droprate_init: float) -> None:
        self.droprate_init = droprate_init or 0.5
        self.weights = nn.Parameter(torch.empty(*weights))
        self.qz_loga = nn.Parameter(torch.empty(units))
        self.use_bias = bias
        if bias:
            self.bias = nn.Parameter(torch.empty(outputs))

    def _reset(self, mode: Literal["fan_in", "fan_out"]) -> None:
        init.kaiming_normal_(self.weights, mode=mode)
        with torch.no_grad():
            self.qz_loga.normal_(math.log(1 - self.droprate_init) - math.log(self.droprate_init), 1e-2)
            if self.use_bias:
                self.bias.zero_()

    def constrain_parameters(self, **kwargs: Any) -> None:
        self.qz_loga.data.clamp_(LOWEST, HIGHEST)

    def cdf_qz(self, x: float) -> Tensor:
        return cdf_stretched_concrete(x, self.qz_loga, self.temperature)

    def quantile_concrete(self, x: Tensor) -> Tensor:
        return sample_z_from_u(x, self.qz_loga, self.temperature)

    def get_eps(self, size: Sequence[int] | Tensor) -> Tensor:
        return uniforms(size.shape if isinstance(size, Tensor) else size, self.qz_loga.device)

    def regularization(self) -> Tensor:
        """Expected log prior of the weights: minus the L2 and L0 penalties, each unit's by its chance to be there."""
        raise NotImplementedError

    def _gates(self, *leading: int) -> Tensor:
        return self.quantile_concrete(self.get_eps((*leading, len(self.qz_loga)))).clamp(0, 1)

    def _mode(self) -> Tensor:
        return evaluate(self.qz_loga, "sigmoid-clamp", left=LIMIT_LEFT, right=LIMIT_RIGHT)

    def _penalties(self) -> Tensor:
        per_weight = 0.5 * self.prior_prec * self.weights.pow(2) + self.lamba
        return -per_weight


class L0Dense(_Gated):
    """A linear layer with a gate for each of its inputs.

    Args:
        weight_decay: strength of the L2 penalty; lamba: of the L0 penalty.
        droprate_init: chance of a gate to be below one half at the start; 0 counts as one half.
        local_rep: in training, gates of their own for each example, not one draw for the batch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_decay: float = 1.0,
        droprate_init: float = 0.5,
        temperature: float = TEMPERATURE,
        lamba: float = 1.0,
        local_rep: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.prior_prec, self.temperature, self.lamba, self.local_rep = weight_decay, temperature, lamba, local_rep
        self._start((in_features, out_features), in_features, out_features, bias, droprate_init)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._reset("fan_out")

    def regularization(self) -> Tensor:
        weights = ((1 - self.cdf_qz(0)) * self._penalties().sum(1)).sum()
        return weights - (0.5 * self.prior_prec * self.bias.pow(2)).sum() if self.use_bias else weights

    def count_expected_flops_and_l0(self) -> tuple[float, float]:
        kept = (1 - self.cdf_qz(0)).sum().item()
        biases = self.out_features if self.use_bias else 0
        return (2 * kept - 1) * self.out_features + biases, kept * self.out_features + biases

    def sample_z(self, batch_size: int, sample: bool = True) -> Tensor:
        """(batch_size, in_features)"""
        return self._gates(batch_size) if sample else self._mode().expand(batch_size, -1)

    def sample_weights(self) -> Tensor:
        return self._gates().unsqueeze(1) * self.weights

    def forward(self, input: Tensor) -> Tensor:
        if self.local_rep or not self.training:
            output = (input * self.sample_z(len(input), sample=self.training)) @ self.weights
        else:
            output = input @ self.sample_weights()
        return output + self.bias if self.use_bias else output


class L0Conv2d(_Gated):
    """A convolution with a gate for each of its feature maps; arguments of `nn.Conv2d` and `L0Dense`.

    As published, the bias is left out in training unless `local_rep`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        droprate_init: float = 0.5,
        temperature: float = TEMPERATURE,
        weight_decay: float = 1.0,
        lamba: float = 1.0,
        local_rep: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels must both be divisible by {groups} groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation, self.output_padding = _pair(padding), _pair(dilation), _pair(0)
        self.prior_prec, self.temperature, self.lamba, self.local_rep = weight_decay, temperature, lamba, local_rep
        self.dim_z = out_channels
        self.input_shape: torch.Size | None = None
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._start(shape, out_channels, out_channels, bias, droprate_init)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._reset("fan_in")

    def regularization(self) -> Tensor:
        kept = 1 - self.cdf_qz(0)
        weights = (kept * self._penalties().sum((1, 2, 3))).sum()
        return (
            weights - (kept * (0.5 * self.prior_prec * self.bias.pow(2) - self.lamba)).sum()
            if self.use_bias
            else weights
        )

    def count_expected_flops_and_l0(self) -> tuple[float, float]:
        """Of the input that was last seen first; raises RuntimeError before there was one."""
        if self.input_shape is None:
            raise RuntimeError("the layer has seen no input: call it once, for the size of its feature maps")
        kept = (1 - self.cdf_qz(0)).sum().item()
        n = self.kernel_size[0] * self.kernel_size[1] * self.in_channels
        places = 1.0
        for size, kernel, pad, step in zip(
            self.input_shape[1:3], self.kernel_size, self.padding, self.stride, strict=True
        ):
            places *= (size - kernel + 2 * pad) / step + 1
        flops, l0 = (2 * n - 1) * places * kept, n * kept
        return (flops + places * kept, l0 + kept) if self.use_bias else (flops, l0)

    def sample_z(self, batch_size: int, sample: bool = True) -> Tensor:
        """(batch_size, out_channels, 1, 1), or (1, out_channels, 1, 1) without sampling."""
        return (self._gates(batch_size) if sample else self._mode().unsqueeze(0))[..., None, None]

    def sample_weights(self) -> Tensor:
        return self._gates()[:, None, None, None] * self.weights

    def forward(self, input_: Tensor) -> Tensor:
        self.input_shape = self.input_shape or input_.shape
        where = (self.stride, self.padding, self.dilation, self.groups)
        if self.training and not self.local_rep:
            return F.conv2d(input_, self.sample_weights(), None, *where)
        output = F.conv2d(input_, self.weights, self.bias if self.use_bias else None, *where)
        return output * self.sample_z(len(output), sample=self.training)


class Mask(nn.Module):
    """The gates of one kind of unit in LLM-Shearing: logits `z_loga` of `mask_shape`, gates of `mask_output_shape`."""

    def __init__(
        self,
        name: str,
        mask_shape: Sequence[int],
        num_params_per_mask: int,
        mask_output_shape: Sequence[int],
        target_sparsity: float,
        target_mask_size: int | None,
        device: torch.device | str,
        eval_target_model: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.num_params_per_mask, self.mask_output_shape = name, num_params_per_mask, mask_output_shape
        self.target_sparsity, self.target_mask_size = target_sparsity, target_mask_size
        self.droprate_init, self.temperature, self.magical_number = 0.5, TEMPERATURE, FACTOR
        self.device, self.eval_target_model = device, eval_target_model
        self.z_loga = nn.Parameter(torch.empty(*mask_shape, device=device).normal_(5, 1e-2))
        self.mask_size = self.z_loga.shape[-1]

    def cdf_qz(self, z_loga: Tensor | None = None) -> Tensor:
        return cdf_stretched_concrete(0, self.z_loga if z_loga is None else z_loga, self.temperature)

    def sample_z(self) -> Tensor:
        return sample_z_from_log_alpha(self.z_loga, self.temperature).reshape(*self.mask_output_shape)

    def deterministic_z(self) -> Tensor:
        """The rule "top-k" of `evaluate` in each row; as many zeros as the target has, if there is one to evaluate."""
        aimed = self.target_mask_size is not None and self.eval_target_model
        zeros = self.mask_size - (self.target_mask_size or 0) if aimed else None
        rows = [
            evaluate(row, "top-k", temperature=self.temperature, zeros=zeros, factor=self.magical_number)
            for row in self.z_loga.reshape(-1, self.mask_size)
        ]
        return torch.stack(rows).reshape(*self.mask_output_shape)

    def forward(self) -> Tensor:
        """Sampled gates in training, else deterministic ones. The published forward passes an argument too many."""
        return self.sample_z() if self.training else self.deterministic_z()

    def constrain_parameters(self) -> None:
        self.z_loga.data.clamp_(LOWEST, HIGHEST)

    def calculate_expected_score_sparsity(self) -> tuple[Tensor, Tensor]:
        score = 1 - self.cdf_qz()
        return score, 1 - score.sum(-1) / self.mask_size


class L0Mask(nn.Module):
    """The gates of subnetwork-probing, of any shape; they start with a mode of `mask_p`."""

    def __init__(self, mask_dim: Sequence[int], mask_p: float = 0.9) -> None:
        super().__init__()
        self.mask_setting = "mask"
        self.mask_scores = nn.Parameter(torch.zeros(mask_dim))
        self.mask_p = mask_p
        self.l, self.r, self.b = LIMIT_LEFT, LIMIT_RIGHT, TEMPERATURE
        self.init_weights()

    def init_weights(self) -> None:
        p = (self.mask_p - self.l) / (self.r - self.l)
        init.constant_(self.mask_scores, math.log(p / (1 - p)))

    def set_temperature(self, temp: float) -> None:
        self.b = temp

    def produce_mask(self) -> Tensor:
        if not self.training:
            return evaluate(self.mask_scores, "sigmoid-clamp", left=self.l, right=self.r)
        u = torch.zeros_like(self.mask_scores).uniform_().clamp(0.0001, 0.9999)
        return hard_concrete(u, self.mask_scores, self.b, self.l, self.r)

    def regularizer(self) -> Tensor:
        """The mean of P(gate != 0)."""
        return log_open(self.mask_scores, self.b, self.l, self.r).exp().mean()


class MaskedLinear(nn.Linear):
    """The linear layer of subnetwork-probing: one gate for each block of `out_w_per_mask` by `in_w_per_mask` weights,
    those whose rows and columns are equal modulo the number of blocks, as published.

    The published class hands `mask_p` to nobody; here the gates start with it.

    Raises:
        ValueError: features that the blocks do not divide.
        TypeError: `from_layer` of what is no `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask_p: float = 0.9,
        out_w_per_mask: int = 1,
        in_w_per_mask: int = 1,
        num_heads: int = 12,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        for features, block in ((out_features, out_w_per_mask), (in_features, in_w_per_mask)):
            if features % block:
                raise ValueError(f"{features} features are no multiple of {block}: choose another size of a block")
        self.num_heads, self.out_w_per_mask, self.in_w_per_mask = num_heads, out_w_per_mask, in_w_per_mask
        self.mask = L0Mask((1, out_features // out_w_per_mask, 1, in_features // in_w_per_mask), mask_p)
        self.cached_activation: Tensor | None = None
        self.do_caching = False

    def produce_mask(self) -> Tensor:
        return self.mask.produce_mask()

    def produce_mask_reshaped(self) -> Tensor:
        """The gate of each weight, (out_features, in_features)."""
        return self._gated(torch.ones_like(self.weight))

    def _gated(self, weight: Tensor) -> Tensor:
        rows, columns = self.mask.mask_scores.shape[1], self.mask.mask_scores.shape[3]
        blocks = weight.reshape(self.out_w_per_mask, rows, self.in_w_per_mask, columns)
        return (self.produce_mask() * blocks).reshape(weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self._gated(self.weight), self.bias)
        if self.do_caching:
            before = () if self.cached_activation is None else (self.cached_activation,)
            self.cached_activation = torch.cat((*before, output.detach()))
        return output

    def activate_caching(self, caching: bool = True) -> None:
        """Keep what comes out, pass after pass, in `cached_activation`; forget what was kept."""
        self.cached_activation, self.do_caching = None, caching

    @classmethod
    def from_layer(cls, layer: nn.Linear, out_w_per_mask: int, in_w_per_mask: int) -> MaskedLinear:
        """With the weights of a layer, which both then share."""
        if type(layer) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(layer).__name__}")
        sizes = {"out_w_per_mask": out_w_per_mask, "in_w_per_mask": in_w_per_mask}
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, **sizes)
        made.weight, made.bias = layer.weight, layer.bias
        made.mask.to(layer.weight)
        return made
