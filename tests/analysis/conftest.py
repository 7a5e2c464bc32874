from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffmask_fast.attribution import Attributions

Make = Callable[..., Attributions]


@pytest.fixture
def make() -> Make:
    """make(texts, keep): attributions of texts, each a list of (token, segment), with P(keep) drawn or given."""

    def attributions(
        texts: list[list[tuple[str, int]]], keep: Any = None, sites: int = 3, seed: int = 0, **fields: Any
    ) -> Attributions:
        count = sum(map(len, texts))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(count, sites, generator=generator)
        values = drawn if keep is None else torch.tensor(keep, dtype=torch.float32)
        sites = values.shape[1]
        given = {
            "original": ["yes"] * len(texts),
            "masked": [["yes"] * sites for _ in texts],
            "site_names": ("embedding", *(f"layer {i}" for i in range(sites - 2)), "last")[-sites:],
            **fields,
        }
        return Attributions(
            tokens=[[token for token, _ in text] for text in texts],
            keep=values,
            segments=torch.tensor([segment for text in texts for _, segment in text], dtype=torch.int8),
            divergence=torch.zeros(len(texts), sites),
            kept_prediction=torch.ones(len(texts), sites, dtype=torch.bool),
            **given,
        )

    return attributions
