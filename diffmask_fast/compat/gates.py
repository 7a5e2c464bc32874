"""The gates of the published DiffMask code (De Cao et al., EMNLP 2020), by its names, on the fused operations.

Constructors, attributes, positional orders and `state_dict` keys are the published ones, with two differences that no
caller meets but by being faster: all layers' gate networks are one call of `probe_logits`, gates and mixing one call of
`gate_mix`. Every gate returns

    (new_state, gates, expected_L0, gates_full, expected_L0_full)

where both "expected L0" are logs of P(gate != 0). The new state has the dtype of the states, all else is float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

from diffmask_fast.compat.distributions import BinaryConcrete, RectifiedStreched, clip_logits
from diffmask_fast.ops import Head, gate_mix, probe_logits
from diffmask_fast.ops.layout import unit_stride
from diffmask_fast.ops.probe_reference import normalised
from diffmask_fast.ops.reference import LEFT, RIGHT, TEMPERATURE, log_open

NEW_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
"""What `torch.nn.utils.parametrizations.weight_norm` calls the parameters of the old `torch.nn.utils.weight_norm`."""

INITIAL_LOGIT = 5.0
Returned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class WeightNormLinear(nn.Module):
    """A linear layer with the parameters of the old `torch.nn.utils.weight_norm`, in its order:
    bias, weight_g, weight_v.

    It can be copied, which that one can't, and also loads the names of the newer parametrization.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", plain.bias)
        self.weight_g = nn.Parameter(plain.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = nn.Parameter(plain.weight.detach())

    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        return normalised(self.weight_g, self.weight_v)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for new, old in NEW_NAMES.items():
            if prefix + new in state_dict:
                state_dict[prefix + old] = state_dict.pop(prefix + new)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def two_layers(input_size: int, hidden_size: int, bias: bool) -> nn.Sequential:
    """Linear - tanh - Linear, weight-normed, with the places that published `state_dict`s have."""
    return nn.Sequential(
        WeightNormLinear(input_size, hidden_size), nn.Tanh(), WeightNormLinear(hidden_size, 1, bias=bias)
    )


class MLPGate(nn.Module):
    """Linear - tanh - Linear, weight-normed: a gate logit (..., 1) for what stands side by side in its arguments.

    With `bias` the last layer's starts at 5, so that gates start open; without, they start half open.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.f = two_layers(input_size, hidden_size, bias)
        if bias:
            nn.init.constant_(self.head().offset, INITIAL_LOGIT)

    def head(self) -> Head:
        """The two layers as `probe_logits` takes them."""
        inner: Any = self.f[0]
        outer: Any = self.f[2]
        offset = outer.weight_g.new_zeros(()) if outer.bias is None else outer.bias.view(())
        return Head(inner.weight_g, inner.weight_v, inner.bias, outer.weight_g, outer.weight_v, offset)

    @staticmethod
    def activate(raw: Tensor, gates: Sequence[Any]) -> Tensor:
        """From what the last layers of K gates of this class give, (..., K), to their logits."""
        return raw

    def alike(self) -> tuple[Any, ...]:
        """What gates have in common that `activate` may take together."""
        return (type(self),)

    def forward(self, *args: Tensor) -> Tensor:
        features = torch.cat(args, -1)
        rows = features.reshape(-1, features.shape[-1])
        return self.activate(probe_logits([rows], [self.head()]), [self]).view(*features.shape[:-1], 1)


class MLPMaxGate(MLPGate):
    """`MLPGate` whose output goes through `max_activation * tanh(.) + bias`, with a trainable bias that starts at 5."""

    def __init__(self, input_size: int, hidden_size: int, max_activation: float = 10, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.f = two_layers(input_size, hidden_size, bias).append(nn.Tanh())
        self.bias = nn.Parameter(torch.tensor(INITIAL_LOGIT))
        self.max_activation = max_activation

    @staticmethod
    def activate(raw: Tensor, gates: Sequence[Any]) -> Tensor:
        return torch.tanh(raw) * gates[0].max_activation + torch.stack([gate.bias for gate in gates])

    def alike(self) -> tuple[Any, ...]:
        return (type(self), self.max_activation)


def logits_of(gates: Sequence[nn.Module], states: Sequence[Tensor], first: Tensor | None = None) -> Tensor:
    """(..., K) logits of K gates: gate i of `states[i]`, or of `first` and `states[i]`.

    One call for all where they are alike, as those of a published gate are; a gate function of the caller's is called
    layer by layer.
    """
    ours = [gate for gate in gates if isinstance(gate, MLPGate) and type(gate).forward is MLPGate.forward]
    if len(ours) == len(gates) and len({gate.alike() for gate in ours}) == 1:
        return ours[0].activate(probe_logits(states, [gate.head() for gate in ours], first), ours)
    before = () if first is None else (first,)
    return torch.cat([gate(*before, state) for gate, state in zip(gates, states, strict=True)], -1)


def chosen_layer(hidden_states: Sequence[Tensor], layer_pred: Any, layers: int, width: int) -> int | None:
    """`layer_pred` as a number from 0, or None; -1 is the last layer. Raises for states that don't fit the gate."""
    if layer_pred is None and len(hidden_states) > layers:
        raise ValueError(
            f"hidden_states has {len(hidden_states)} states and this gate {layers} layers: make it with "
            f"num_hidden_layers={len(hidden_states)}, or leave states out"
        )
    count = min(layers, len(hidden_states))
    chosen = None
    if layer_pred is not None:
        chosen = operator.index(layer_pred)
        if not -count <= chosen < count:
            raise ValueError(
                f"layer_pred is {chosen}; with {len(hidden_states)} states and {layers} layers expected 0 to "
                f"{count - 1}, or None for all of them"
            )
        chosen %= count
    for i, state in enumerate(hidden_states[:count]):
        if state.shape[-1] != width:
            raise ValueError(f"hidden_states[{i}] is {state.shape[-1]} wide; this gate was made for {width}")
    return chosen


def blend(state: Tensor, gates: Tensor, placeholder: Tensor) -> Tensor:
    """`gates * state + (1 - gates) * placeholder`, for gates that are drawn already, one for each position."""
    return torch.lerp(placeholder.to(state.dtype), state, gates.to(state.dtype).unsqueeze(-1))


def rectified(logits: Tensor) -> RectifiedStreched:
    """The law of the paper's gates."""
    return RectifiedStreched(BinaryConcrete(TEMPERATURE, logits), l=LEFT, r=RIGHT)


def _filled(shape: Sequence[int], init_vector: Tensor | None) -> nn.Parameter:
    if init_vector is None:
        return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape)))
    return nn.Parameter(init_vector.detach().expand(*shape).clone())


class DiffMaskGateInput(nn.Module):
    """Input masking: the state of layer 0 by the product of the gates of layers 0 to `layer_pred`.

    Args:
        hidden_size: width H of the states.
        hidden_attention: width inside the gate networks.
        num_hidden_layers: how many states there are, L: 14 for a BERT of 12 layers.
        max_position_embeddings: P, positions of the placeholder; 1 for one vector at all positions.
        gate_fn: class of the gate networks, called as `gate_fn(2 * H, hidden_attention, bias=gate_bias)`.
        gate_bias: whether their last layer has a bias.
        placeholder: whether what replaces a state is learned; else it is zero.
        init_vector: (H,), what a learned placeholder starts as.

    Shapes returned, with K = layer_pred + 1, or L for None: (B, T, H), (B, T), (B, T), (B, T, K), (B, T, K); gates are
    running products over layers, log P(gate != 0) running sums.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_attention: int,
        num_hidden_layers: int,
        max_position_embeddings: int,
        gate_fn: Callable[..., nn.Module] = MLPMaxGate,
        gate_bias: bool = True,
        placeholder: bool = False,
        init_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.g_hat = nn.ModuleList(
            gate_fn(hidden_size * 2, hidden_attention, bias=gate_bias) for _ in range(num_hidden_layers)
        )
        if placeholder:
            self.placeholder = _filled((1, max_position_embeddings, hidden_size), init_vector)
        else:
            self.register_buffer("placeholder", torch.zeros(1, 1, hidden_size))

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor | None, layer_pred: int | None) -> Returned:
        """`mask` is ignored, as published: padding is for the loss to leave out."""
        return self._masked(hidden_states, layer_pred)

    def _masked(self, hidden_states: Sequence[Tensor], layer_pred: int | None, aggregated: bool = True) -> Returned:
        chosen = chosen_layer(hidden_states, layer_pred, len(self.g_hat), self.placeholder.shape[-1])
        count = len(hidden_states) if chosen is None else chosen + 1
        first = unit_stride(hidden_states[0])
        logits = logits_of(list(self.g_hat)[:count], hidden_states[:count], first)
        mixed, gates, _ = gate_mix(first, clip_logits(logits), self.placeholder[:, : first.shape[-2]])
        opened = log_open(logits)
        opened = opened.cumsum(-1) if aggregated else opened
        return mixed, gates[..., -1], opened[..., -1], gates, opened


class DiffMaskGateHidden(nn.Module):
    """Hidden masking: the state of layer `layer_pred` by the gate of that layer alone.

    Arguments: those of `DiffMaskGateInput`; gate functions read one state, H wide.

    Shapes returned: (B, T, H), (B, T), (B, T), (B, T, K), (B, T, K), where K is 1; for `layer_pred=None` it is L, the
    gates of all layers, and the first three are those of layer 0.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_attention: int,
        num_hidden_layers: int,
        max_position_embeddings: int,
        gate_fn: Callable[..., nn.Module] = MLPMaxGate,
        gate_bias: bool = True,
        placeholder: bool = False,
        init_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.g_hat = nn.ModuleList(
            gate_fn(hidden_size, hidden_attention, bias=gate_bias) for _ in range(num_hidden_layers)
        )
        if placeholder:
            shape = (1, max_position_embeddings, hidden_size)
            self.placeholder = nn.ParameterList(_filled(shape, init_vector) for _ in range(num_hidden_layers))
        else:
            self.register_buffer("placeholder", torch.zeros(num_hidden_layers, 1, 1, hidden_size))

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor | None, layer_pred: int | None) -> Returned:
        """`mask` is ignored, as published."""
        chosen = chosen_layer(hidden_states, layer_pred, len(self.g_hat), self.placeholder[0].shape[-1])
        k = chosen or 0
        read = slice(len(hidden_states)) if chosen is None else slice(k, k + 1)
        logits = logits_of(list(self.g_hat)[read], hidden_states[read])
        opened = log_open(logits)
        state = unit_stride(hidden_states[k])
        placeholder = self.placeholder[k][:, : state.shape[-2]]
        if chosen is None:
            gates = rectified(logits).rsample()
            mixed = blend(state, gates[..., 0], placeholder)
        else:
            mixed, gates, _ = gate_mix(state, clip_logits(logits), placeholder)
        return mixed, gates[..., 0], opened[..., 0], gates, opened


class PerSampleGate(nn.Module):
    """Gates that are parameters: one logit for each example, position and layer, no network.

    Args:
        hidden_size: width H of the states.
        num_hidden_layers: L, how many states there are.
        max_position_embeddings: P, positions that there are logits for; texts may be shorter.
        batch_size: B, examples.
        placeholder: whether what replaces a state is learned; else it is zero.
        init_vector: (L, H) or (H,), what a learned placeholder starts as.

    Shapes returned: (B, T, H), (B, T), (B, T), (B, T, L), (B, T, L). `layer_pred=None` stands for layer 0.
    """

    def __init__(
        self,
        hidden_size: int,
        num_hidden_layers: int,
        max_position_embeddings: int,
        batch_size: int = 1,
        placeholder: bool = False,
        init_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((batch_size, max_position_embeddings, num_hidden_layers), INITIAL_LOGIT))
        if placeholder:
            if init_vector is not None:
                init_vector = init_vector.reshape(1, -1, 1, hidden_size)
            shape = (batch_size, num_hidden_layers, max_position_embeddings, hidden_size)
            self.placeholder = _filled(shape, init_vector)
        else:
            self.register_buffer("placeholder", torch.zeros(1, num_hidden_layers, 1, hidden_size))

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of logits (B, T, L), and the logs of P(gate != 0)."""
        raise NotImplementedError

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor | None, layer_pred: int | None) -> Returned:
        """`mask` is ignored, as published."""
        batch, positions, layers = self.logits.shape
        k = chosen_layer(hidden_states, layer_pred, layers, self.placeholder.shape[-1]) or 0
        state = hidden_states[k]
        length = state.shape[-2]
        if length > positions or batch not in (1, len(state)):
            raise ValueError(
                f"hidden_states[{k}] has shape {tuple(state.shape)}; this gate has logits for batches of {batch} and "
                f"{positions} positions: give it that batch, padded to no more"
            )
        gates, opened = self.draw(self.logits[:, :length])
        mixed = blend(state, gates[..., k], self.placeholder[:, k, :length])
        return mixed, gates[..., k], opened[..., k], gates, opened


class PerSampleDiffMaskGate(PerSampleGate):
    """Hard Concrete gates, differentiable."""

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return rectified(logits).rsample(), log_open(logits)


class PerSampleREINFORCEGate(PerSampleGate):
    """Bernoulli gates, 0 or 1, for score-function gradients: none flows through them."""

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        law = Bernoulli(logits=logits)
        return law.sample(), law.log_prob(torch.ones_like(logits))
