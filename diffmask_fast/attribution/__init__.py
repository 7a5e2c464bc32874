"""What a trained probe says about texts: `Attributions` for a data set, `Attribution` for one text."""

from __future__ import annotations

from diffmask_fast.attribution.result import SEGMENT_NAMES, Attribution, Attributions

__all__ = ["SEGMENT_NAMES", "Attribution", "Attributions"]
