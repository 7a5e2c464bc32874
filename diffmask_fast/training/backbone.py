"""The frozen model as a training runs it: in another dtype, with the attention that is faster there, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

EAGER_UP_TO = 512
"""Tokens up to which, in 16 bits on a CPU, attention by plain products is preferred: PyTorch's fused kernel takes two
to four times as long there, most of it in backward (bench/train_step.py shows what that is of a step). Memory grows
with the square of the length, so longer texts keep the model's own attention."""


@contextmanager
def compiled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The forward of each of these modules compiled, and afterwards as it was.

    Hooks are called around a module's forward, so states are captured and replaced between the compiled parts. Layers
    of one class that are called alike share one graph: what site is drawn makes no difference to any of them.
    """
    chosen = list(layers)
    try:
        for layer in chosen:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)


@contextmanager
def running_in(model: nn.Module, dtype: torch.dtype | None, longest: int) -> Iterator[nn.Module]:
    """The model with parameters of `dtype`, and afterwards with its own again, to the last bit.

    Unlike autocast it rounds the weights once and not in every pass. Buffers stay as they are: tables of positions
    and running statistics lose too much in 16 bits.

    Args:
        model: the frozen model.
        dtype: None leaves everything as it is.
        longest: tokens of the longest text that it will see.
    """
    kept = {p: p.data for p in model.parameters() if dtype is not None and p.is_floating_point()}
    attention = _attention_to_restore(model, dtype, longest)
    try:
        for parameter, value in kept.items():
            parameter.data = value.to(dtype)
        if attention is not None:
            _set_attention(model, "eager")
        yield model
    finally:
        for parameter, value in kept.items():
            parameter.data = value
        if attention is not None:
            _set_attention(model, attention)


def _attention_to_restore(model: nn.Module, dtype: torch.dtype | None, longest: int) -> str | None:
    """The name of the model's attention, if it is one to be replaced meanwhile."""
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    several = getattr(config, "sub_configs", None)  # each part of such a model has its own
    faster = dtype in (torch.bfloat16, torch.float16) and on_cpu and longest <= EAGER_UP_TO
    return attention if faster and attention == "sdpa" and not several else None


def _set_attention(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
