"""A result with many texts, from one with a few."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffmask_fast.attribution import Attributions


def repeated(few: Attributions, times: int) -> Attributions:
    """All texts so many times."""
    return replace(
        few,
        **{name: getattr(few, name) * times for name in ("tokens", "original", "masked")},
        **{
            name: torch.cat([getattr(few, name)] * times)
            for name in ("keep", "segments", "divergence", "kept_prediction")
        },
    )
