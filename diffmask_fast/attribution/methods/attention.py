"""How much attention a layer pays to the states that enter it: no explanation, but the usual thing to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.methods import Found
from diffmask_fast.moments import Moments

_of_batches: WeakKeyDictionary[Batch, list[Tensor]] = WeakKeyDictionary()  # one pass gives all sites of a batch


def attention(batch: Batch, site: int, home: Moments) -> Found:
    """The attention weights on each token in the layer that its state enters: the largest of the heads, on average
    over the queries (the baseline of De Cao et al. 2020, section 5). Queries are the real tokens only.

    Raises:
        ValueError: a model without attention, or one whose weights can't be had or can't be matched to its sites.
    """
    if batch not in _of_batches:
        _of_batches[batch] = received(batch)
    layer = sum(other.side == "input" for other in batch.patched.sites[:site])
    return Found(scores=_of_batches[batch][layer])


def received(batch: Batch) -> list[Tensor]:
    """(B, T) float32 for each layer."""
    model = batch.patched.model
    name, own = type(model).__name__, getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own is None:
        raise ValueError(f"{name} has no attention that transformers knows of: use another method")
    with exposed_attention(model, own):
        weights = batch.patched.run({**batch.inputs, "output_attentions": True}).output.get("attentions")
    if not weights or not all(isinstance(layer, Tensor) for layer in weights):
        raise ValueError(
            f"the attention of {name} ({own}) gives no weights and can't be changed any more: load the model with "
            "attn_implementation='eager'"
        )
    layers = sum(site.side == "input" for site in batch.patched.sites)
    if len(weights) != layers:
        raise ValueError(
            f"{name} has {layers} sites that enter a layer and the attention weights of {len(weights)} layers: which "
            "belongs to which is not known, use another method"
        )
    queries = batch.real.unsqueeze(-1)
    return [(layer.float().amax(1) * queries).sum(1) / queries.sum(1) for layer in weights]


@contextmanager
def exposed_attention(model: Any, own: str) -> Iterator[None]:
    """This model with transformers' eager attention, the one that gives its weights, and afterwards with its `own`.

    Models that choose their attention when they are made are left as they are: many of them go back to the eager one
    by themselves when they are asked for weights. So are those of several parts, each of which has its own.
    """
    can = getattr(model, "_can_set_attn_implementation", None)
    if own == "eager" or can is None or not can() or getattr(model.config, "sub_configs", None):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
