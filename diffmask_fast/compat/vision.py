"""The gates, getter and setter of Vision DiffMask (Nalmpantis et al., 2022), by its names.

They differ from DiffMask's: the bounded network has its scale and shift as arguments, and its trainable shift is named
`add_activation`; gates take no mask, and can leave the logs of P(gate != 0) of the layers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast.compat import gates
from diffmask_fast.compat.distributions import BinaryConcrete, RectifiedStreched, Streched
from diffmask_fast.compat.gates import MLPGate, Returned
from diffmask_fast.compat.getters import run

__all__ = [
    "BinaryConcrete",
    "DiffMaskGateInput",
    "MLPGate",
    "MLPMaxGate",
    "RectifiedStreched",
    "Streched",
    "vit_getter",
    "vit_setter",
]


class MLPMaxGate(MLPGate):
    """`MLPGate` whose output goes through `mul_activation * tanh(.) + add_activation`, the latter trainable."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mul_activation: float = 10.0,
        add_activation: float = 5.0,
        bias: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.f = gates.two_layers(input_size, hidden_size, bias).append(nn.Tanh())
        self.add_activation = nn.Parameter(torch.tensor(float(add_activation)))
        self.mul_activation = mul_activation

    @staticmethod
    def activate(raw: Tensor, gates: Sequence[Any]) -> Tensor:
        return torch.tanh(raw) * gates[0].mul_activation + torch.stack([gate.add_activation for gate in gates])

    def alike(self) -> tuple[Any, ...]:
        return (type(self), self.mul_activation)


class DiffMaskGateInput(gates.DiffMaskGateInput):
    """Input masking, as `diffmask_fast.compat.gates.DiffMaskGateInput`.

    `gate_fn` is called as `gate_fn(2 * H, hidden_attention, mul_activation, add_activation, gate_bias)`.
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_attention: int,
        num_hidden_layers: int,
        max_position_embeddings: int,
        gate_fn: Callable[..., nn.Module] = MLPMaxGate,
        mul_activation: float = 10.0,
        add_activation: float = 5.0,
        gate_bias: bool = True,
        placeholder: bool = False,
        init_vector: Tensor | None = None,
    ) -> None:
        def network(reads: int, width: int, bias: bool) -> nn.Module:
            return gate_fn(reads, width, mul_activation, add_activation, bias)

        sizes = (hidden_size, hidden_attention, num_hidden_layers, max_position_embeddings)
        super().__init__(*sizes, network, gate_bias, placeholder, init_vector)

    def forward(  # type: ignore[override]
        self, hidden_states: Sequence[Tensor], layer_pred: int | None, aggregated: bool = True
    ) -> Returned:
        """Without `aggregated` the logs of P(gate != 0) are each layer's own, not their running sum."""
        return self._masked(hidden_states, layer_pred, aggregated)


def _sites(model: Any) -> list[tuple]:
    """transformers 5 has the layers in another place than 4."""
    layers = "vit.encoder.layer" if hasattr(model.vit, "encoder") else "vit.layers"
    return [
        ("patches", "vit.embeddings.patch_embeddings", "output"),
        ("layer {i}", f"{layers}.*", "input"),
        ("last", f"{layers}.-1", "output"),
    ]


def vit_getter(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and states of a ViTForImageClassification: patch embeddings (B, T - 1, H), the layers' inputs, the last
    layer's output (B, T, H). Gates want the [CLS] token before the patches too, for the caller to put there."""
    outputs, states = run(model, {"pixel_values": x}, rows=_sites(model))
    return outputs.logits, list(states)


def vit_setter(model: nn.Module, x: Tensor, hidden_states: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
    """The same with states replaced, None to leave one. What is given for the patches begins with [CLS], which is cut
    off."""
    given = [state[:, 1:] if i == 0 and state is not None else state for i, state in enumerate(hidden_states)]
    outputs, states = run(model, {"pixel_values": x}, given, rows=_sites(model))
    return outputs.logits, list(states)
