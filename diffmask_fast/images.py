"""Pictures as the transformers of vision read them: a token for each patch, and one or more for the whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.data import FIRST, SPECIAL, Examples, label_names
from diffmask_fast.predictions import Classes, Kind, kind_for, require_kind
from diffmask_fast.sites import patch
from diffmask_fast.sites.derive import reads_pictures


@torch.no_grad()
def encode_images(pixels: Tensor, model: Any, kind: Kind | None = None) -> Examples:
    """Pictures for a Hugging Face model whose layers read them as one row of tokens, such as ViT or DeiT.

    The tokens of the whole picture come first and are special ones; those of the patches are named by row and column.

    Args:
        pixels: (N, channels, height, width), as the model's image processor makes them (`pixel_values`).
        model: the model.
        kind: what it predicts, see `encode`.

    Raises:
        TypeError: pixels that are no float tensor.
        ValueError: no picture, another number of dimensions, NaN; a model that does not read patches, or makes no row
            of tokens of them.
    """
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"pixels: expected a float tensor, got {got}: give the image processor's pixel_values")
    if pixels.dim() != 4 or not len(pixels) or not torch.isfinite(pixels).all():
        raise ValueError(
            f"pixels has the shape {tuple(pixels.shape)}; expected (N, channels, height, width) with N of 1 or more, "
            "and neither NaN nor infinity"
        )
    kind = kind_for(model) if kind is None else kind
    require_kind(model, kind)
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if size is None or not reads_pictures(model):
        raise ValueError(f"{type(model).__name__} reads no pictures as patches: give a model such as ViT")
    height, width = size if isinstance(size, Sequence) else (size, size)
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    with patch(model) as patched:
        device = next(model.parameters()).device
        every = range(len(patched.sites))
        states = patched.run({"pixel_values": pixels[:1].to(device)}, capture=every).states
    shapes = {tuple(state.shape[:2]) if state.dim() == 3 else tuple(state.shape) for state in states.values()}
    whole = states[0].shape[1] - rows * columns
    if len(shapes) > 1 or states[0].dim() != 3 or whole < 0:
        raise ValueError(
            f"the states of {type(model).__name__} have the shapes {sorted(shapes)}, and its picture has "
            f"{rows} x {columns} patches: expected one row of tokens at all sites, with one for each patch"
        )
    names = whole_picture(model.config, whole)
    names += [f"{row},{column}" for row in range(rows) for column in range(columns)]
    label = label_names(model)
    return Examples(
        [{"pixel_values": one, "attention_mask": [1] * len(names)} for one in pixels.cpu()],
        [names] * len(pixels),
        [[SPECIAL] * whole + [FIRST] * (rows * columns)] * len(pixels),
        lambda i, answer: (kind or Classes()).words(answer, label),
        fixed=frozenset({"pixel_values"}),
        kind=kind,
    )


def whole_picture(config: Any, count: int) -> list[str]:
    """Names of the tokens that stand for the whole picture."""
    registers = min(count, getattr(config, "num_register_tokens", 0) or 0)
    named = ["[CLS]", "[DIST]" if config.model_type == "deit" else "[1]"]
    named += [f"[{i}]" for i in range(2, count)]
    return [*named[: count - registers], *(f"[REG{i}]" for i in range(registers))]
