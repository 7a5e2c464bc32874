"""Reading texts batch by batch, and one result for all of them: what every attribution method goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from diffmask_fast import processes
from diffmask_fast.attribution.result import Attributions
from diffmask_fast.attribution.windows import merge, whole_texts
from diffmask_fast.data import Examples, encode
from diffmask_fast.masking import frozen
from diffmask_fast.predictions import require_kind
from diffmask_fast.progress import progress
from diffmask_fast.sites import Patched, patch

ReadBatch = Callable[[list[int]], list[dict[str, Any]]]


def over_texts(
    model: nn.Module,
    texts: Examples | Sequence[str | tuple[str, str]],
    tokenizer: Any,
    prepare: Callable[[Patched, Examples], ReadBatch],
    *,
    method: str,
    masking: str,
    sites: Sequence[int] | None = None,
    batch_size: int = 16,
    meta: dict[str, Any] | None = None,
    show_progress: bool = False,
    shared: bool = False,
) -> Attributions:
    """What `prepare(patched, examples)` says about batches, numbered as the examples are, as one result.

    It gives for each example of a batch what `batch.say` returns. All else is as `explain` has it.
    """
    texts = checked(model, texts, tokenizer)
    members = whole_texts(texts)
    with frozen(model), patch(model) as patched:
        read = prepare(patched, texts)
        rows: dict[int, dict[str, Any]] = {}
        batches = texts.batches(batch_size)
        for batch in progress(processes.share(batches) if shared else batches, method, show_progress):
            rows |= zip(batch, read(batch), strict=True)
        if shared:
            if texts.kind is not None:  # all have it, and functions in it could not travel
                rows = {i: {**row, "kind": None} for i, row in rows.items()}
            rows = processes.gather(rows)
        names = [site.name for site in patched.sites]
    merged = [merge(texts, numbers, [rows[i] for i in numbers]) for numbers in members]
    return Attributions(
        tokens=[text["tokens"] for text in merged],
        site_names=tuple(names if sites is None else (names[site] for site in sites)),
        keep=torch.cat([text["keep"] for text in merged]),
        segments=torch.tensor([kind for text in merged for kind in text["segments"]], dtype=torch.int8),
        divergence=torch.stack([text["divergence"] for text in merged]),
        original=[text["original"] for text in merged],
        masked=[text["masked"] for text in merged],
        kept_prediction=torch.stack([text["kept_prediction"] for text in merged]),
        scores=None if merged[0]["scores"] is None else torch.cat([text["scores"] for text in merged]),
        details={name: torch.stack([text["details"][name] for text in merged]) for name in merged[0]["details"]},
        method=method,
        masking=masking,
        meta=meta or {},
    )


def checked(model: nn.Module, texts: Examples | Sequence[str | tuple[str, str]], tokenizer: Any) -> Examples:
    """The texts, encoded if they are not yet. Raises as `explain` does for texts and models that can't be explained."""
    if not isinstance(texts, Examples):
        if tokenizer is None:
            raise TypeError("tokenizer is missing: give the model's tokenizer, or texts as encoded Examples")
        texts = encode(tokenizer, [texts] if isinstance(texts, str) else texts, model)
    if not len(texts):
        raise ValueError("texts is empty: give at least one")
    require_kind(model, texts.kind)
    return texts
