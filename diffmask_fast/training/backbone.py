"""The frozen model as a training runs it: in another dtype, with the attention that is faster there, compiled, or with
little kept for backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PRODUCTS = "diffmask_fast_products"
PRODUCTS_UP_TO = 512
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
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Of each of these modules, kept for backward is what enters it; it runs again then. Afterwards all is as it was.

    What runs again is the module's forward, without the hooks around it: the states that were put in its place, which
    are what entered, are still there. The transformers' own checkpointing would lose them where it wraps the hooks too.
    A frozen model draws nothing, so that no state of a generator has to be kept.
    """
    before = {layer: vars(layer).get("forward") for layer in layers}
    try:
        for layer in before:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


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
            _set_attention(model, PRODUCTS)
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
    faster = dtype in (torch.bfloat16, torch.float16) and on_cpu and longest <= PRODUCTS_UP_TO
    can = getattr(model, "_can_set_attn_implementation", None)  # older models choose theirs when they are made
    return attention if faster and attention == "sdpa" and not several and can is not None and can() else None


def _set_attention(model: Any, name: str) -> None:
    if name == PRODUCTS:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(PRODUCTS, attention_by_products)
        AttentionMaskInterface.register(PRODUCTS, sdpa_mask)
    model.set_attn_implementation(name)


def attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes, as two matrix products and a softmax in the states' own dtype.

    Of a layer nothing but the weights is kept for backward: 2 bytes each, where transformers' "eager" keeps 6.

    Args:
        module, query, key, value, attention_mask, scaling, is_causal: as transformers hands them to an attention;
            query (B, heads, T, D), key and value with as many heads or a divisor of that.
        dropout: a frozen model has none.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores.add_(attention_mask)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
