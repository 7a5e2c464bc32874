"""The frozen model as a training runs it: in another dtype, with the attention that is faster there, compiled, or with
little kept for backward."""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffmask_fast.training import attention

X86 = ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Whether the device that a training runs on has instructions for products in bfloat16. A processor with AVX2
    alone takes many times as long in it as in float32. Accelerators other than CUDA's count as having none: none was
    tried."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in X86:  # oneDNN also says yes where AVX-512 only imitates them
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
def running_in(model: Any, dtype: torch.dtype | None) -> Iterator[Any]:
    """The model with parameters of `dtype`, and afterwards with its own again, to the last bit.

    Unlike autocast it rounds the weights once and not in every pass. Buffers stay as they are: tables of positions
    and running statistics lose too much in 16 bits. On a CPU, 16 bits come with an attention that is faster there.

    Args:
        model: the frozen model.
        dtype: None leaves everything as it is.
    """
    kept = {p: p.data for p in model.parameters() if dtype is not None and p.is_floating_point()}
    own = _attention_to_restore(model, dtype)
    try:
        for parameter, value in kept.items():
            parameter.data = value.to(dtype)
        if own is not None:
            attention.register()
            model.set_attn_implementation(attention.NAME)
        yield model
    finally:
        for parameter, value in kept.items():
            parameter.data = value
        if own is not None:
            model.set_attn_implementation(own)


def _attention_to_restore(model: nn.Module, dtype: torch.dtype | None) -> str | None:
    """The name of the model's attention, if it is one to be replaced meanwhile."""
    config = getattr(model, "config", None)
    own = getattr(config, "_attn_implementation", None)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    several = getattr(config, "sub_configs", None)  # each part of such a model has its own
    faster = dtype in (torch.bfloat16, torch.float16) and on_cpu and own == "sdpa" and not several
    can = getattr(model, "_can_set_attn_implementation", None)  # older models choose theirs when they are made
    return own if faster and can is not None and can() and not _picks_keys_by_name(model) else None


def _picks_keys_by_name(model: nn.Module) -> bool:
    """Whether its code masks the keys that a query does not look at only for attentions of certain names, and hands
    their numbers to others, as that of DeepSeek V3.2 does."""
    source = inspect.getsource(inspect.getmodule(type(model)) or type(model))
    return re.search(r"""_attn_implementation in [(\[][^)\]]*["']sdpa["']""", source) is not None
