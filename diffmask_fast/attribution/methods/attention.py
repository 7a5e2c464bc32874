"""How much attention a layer pays to the states that enter it: no explanation, but the usual thing to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.methods import Found
from diffmask_fast.moments import Moments

_of_batches: WeakKeyDictionary[Batch, list[Tensor]] = WeakKeyDictionary()  # one pass gives all sites of a batch


def attention(batch: Batch, site: int, home: Moments) -> Found:
    """The attention weights on each token in the layer that its state enters: the largest of the heads, on average
    over the queries (the baseline of De Cao et al. 2020, section 5). Queries are the real tokens only.

    Raises:
        ValueError: a model whose attention weights can't be had, see `exposed_attention`.
    """
    if batch not in _of_batches:
        _of_batches[batch] = received(batch)
    layer = sum(other.side == "input" for other in batch.patched.sites[:site])
    return Found(scores=_of_batches[batch][layer])


def received(batch: Batch) -> list[Tensor]:
    """(B, T) float32 for each layer."""
    with exposed_attention(batch.patched.model):
        output = batch.patched.run({**batch.inputs, "output_attentions": True}).output
    weights = getattr(output, "attentions", None)
    layers = sum(site.side == "input" for site in batch.patched.sites)
    if not weights or len(weights) != layers or not all(isinstance(layer, Tensor) for layer in weights):
        raise ValueError(
            f"{type(batch.patched.model).__name__} has {layers} sites that enter a layer, and with output_attentions "
            f"gives the weights of {len(weights or ())}: its attention can't be matched to them, use another method"
        )
    queries = batch.real.unsqueeze(-1)
    return [(layer.float().amax(1) * queries).sum(1) / queries.sum(1) for layer in weights]


@contextmanager
def exposed_attention(model: nn.Module) -> Iterator[None]:
    """This model with the eager attention of transformers, the one that gives its weights, and afterwards its own.

    Raises:
        ValueError: no transformers model with an attention; one whose attention can't be changed after it was made.
    """
    config: Any = getattr(model, "config", None)
    own = getattr(config, "_attn_implementation", None)
    name = type(model).__name__
    if own is None:
        raise ValueError(f"{name} has no attention that transformers knows of: use another method")
    if own == "eager":
        yield
        return
    can: Any = getattr(model, "_can_set_attn_implementation", None)
    # of a model of several parts each has its own, and not all versions of transformers can set these back
    if can is None or not can() or getattr(config, "sub_configs", None):
        raise ValueError(
            f"the attention of {name} ({own}) gives no weights and can't be changed now: load the model with "
            "attn_implementation='eager'"
        )
    setter: Any = model
    setter.set_attn_implementation("eager")
    try:
        yield
    finally:
        setter.set_attn_implementation(own)
