"""Attention of a frozen model in 16 bits on a CPU: in pieces that fit the cache, whose weights backward makes again.

PyTorch's fused kernel takes up to four times as long there, most of it in backward (`bench/attention.py`); products of
whole batches go through memory with every step, and keep weights that grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NAME = "diffmask_fast"
PIECE = 1 << 20
"""Scores that are worked on at once, as near as whole heads of an example come to it. Of half and twice as many neither
was faster at 126 to 2,048 tokens, on cores with 1 MB of second-level cache."""
LONGEST = 1024
"""Tokens up to which it is faster than PyTorch's fused attention, or about as fast (`bench/attention.py`)."""
_BEYOND = ("position_bias", "cache", "softcap")  # what "sdpa" takes (or refuses) beside a mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes, in the states' own dtype; registered with transformers as `NAME`.

    Args:
        module, query, key, value, attention_mask, scaling, is_causal, more: as transformers hands them to an attention;
            query (B, heads, T, D), key and value with as many heads or a divisor of that. It is "sdpa" itself that runs
            for longer texts, and with a position bias, a cache, a soft cap or a mask that needs a gradient.
        dropout: a frozen model has none.

    Returns:
        (B, T, heads, D), contiguous, and no weights.
    """
    learned = attention_mask is not None and (attention_mask.requires_grad or attention_mask.dim() != 4)
    long = max(query.shape[2], key.shape[2]) > LONGEST
    if long or learned or len(query) != len(key) or any(more.get(name) is not None for name in _BEYOND):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        settings = {"scaling": scaling, "is_causal": is_causal, **more}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(attention_mask is None and is_causal and query.shape[2] > 1)
    return torch.ops.diffmask_fast.attention(query * scale, key, value, attention_mask, causal), None


def register() -> None:
    """Tell transformers of this attention; the masks that it takes are those of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class _Piece(NamedTuple):
    """Some heads of one example and the keys that any of their queries sees."""

    example: int
    heads: slice
    keys: slice
    mask: Tensor | None  # (1 or heads, T, keys): bool, True where a score counts, or what is added to each
    causal: bool

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """(heads, T, keys)"""
        scores = query[self.example, self.heads] @ key[self.example, self.heads, self.keys].mT
        if self.causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        if self.mask is None:
            return scores.softmax(-1)
        masked = self.mask.dtype == torch.bool
        scores = scores.masked_fill_(~self.mask, -torch.inf) if masked else scores.add_(self.mask)
        return torch._safe_softmax(scores, -1)  # 0 for a query that sees no key


def _pieces(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Iterator[_Piece]:
    examples, heads, tokens, _ = query.shape
    longest = key.shape[2]
    seen = [longest] * examples
    if mask is not None:
        mask = mask.expand(examples, mask.shape[1], tokens, longest)
        alone = _padding(mask)
        mask, seen = (None, alone) if alone else (mask, seen)
    for example, keys in enumerate(seen):
        together = max(1, PIECE // (tokens * keys))
        for first in range(0, heads, together):
            part = slice(first, first + together)
            masked = None if mask is None else mask[example, part if mask.shape[1] > 1 else slice(None)]
            yield _Piece(example, part, slice(0, keys), masked, causal)


def _padding(mask: Tensor) -> list[int] | None:
    """Where a mask (B, 1 or heads, T, keys) says no more than how many keys each example has: these numbers."""
    if mask.dtype != torch.bool or mask.shape[1] > 1:
        return None
    keys = mask[:, 0, 0]
    if mask.stride(2) != 0 and not (mask[:, 0] == keys[:, None]).all():
        return None
    counts = keys.sum(-1)
    first = torch.arange(keys.shape[1], device=keys.device) < counts[:, None]
    return counts.tolist() if (keys == first).all() and (counts > 0).all() else None


@torch.library.custom_op("diffmask_fast::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Of queries that are scaled already: (B, T, heads, D)."""
    examples, heads, tokens, _ = query.shape
    out = query.new_empty(examples, tokens, heads, value.shape[-1])
    for piece in _pieces(query, key, mask, causal):
        example, part, keys, *_ = piece
        mixed = piece.weights(query, key) @ value[example, part, keys]
        out[example, :, part] = mixed.transpose(0, 1)
    return out


@torch.library.custom_op("diffmask_fast::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for piece in _pieces(query, key, mask, causal):
        example, part, keys, *_ = piece
        weights = piece.weights(query, key)
        above = grad[example, :, part].transpose(0, 1)
        onward = above @ value[example, part, keys].mT
        scores = torch._softmax_backward_data(onward, weights, -1, weights.dtype)
        grad_query[example, part] = scores @ key[example, part, keys]
        # oneDNN is slow where the left one of two large factors is transposed
        grad_key[example, part, keys] = (query[example, part].mT @ scores).mT
        grad_value[example, part, keys] = (above.mT @ weights).mT
    return grad_query, grad_key, grad_value


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    examples, heads, tokens, _ = query.shape
    return query.new_empty(examples, tokens, heads, value.shape[-1])


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


_attention.register_autograd(_gradient, setup_context=_save)
