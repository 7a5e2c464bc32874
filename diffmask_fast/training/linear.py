"""Linear layers of a frozen model in bfloat16 on an x86 CPU, with the bias added within the product.

PyTorch writes the bias out for every row first and lets the product add to it, and in backward has oneDNN take the
weight as the slower kind of factor. `bench/train_step.py` has what that costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def replaceable(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a model that `forward` may stand in for: `torch.nn.Linear` itself, in bfloat16 on a CPU."""
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            if all(p.dtype == torch.bfloat16 and p.device.type == "cpu" for p in layer.parameters(recurse=False)):
                yield layer


def forward(layer: nn.Linear, states: Tensor) -> Tensor:
    """What the layer's own `forward` computes, (..., in) to (..., out). A layer that learns, states of another dtype
    and graphs that are compiled have its own."""
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters(recurse=False))
    if learns or states.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return nn.functional.linear(states, layer.weight, layer.bias)
    return _Product.apply(states, layer.weight, layer.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(grad, ctx.weight.t(), None), None, None
