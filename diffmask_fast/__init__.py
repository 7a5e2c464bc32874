"""DiffMask, fast: which tokens a trained model no longer needs, and at which depth.

Names are imported on first use, so that ``import diffmask_fast`` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "GateMix": "diffmask_fast.ops",
    "draw_seed": "diffmask_fast.ops",
    "gate_mix": "diffmask_fast.ops",
    "HardConcrete": "diffmask_fast.distributions",
    "Site": "diffmask_fast.sites",
    "patch": "diffmask_fast.sites",
    "register_sites": "diffmask_fast.sites",
    "sites_of": "diffmask_fast.sites",
    "Probe": "diffmask_fast.probes",
    "load_probe": "diffmask_fast.probes",
    "save_probe": "diffmask_fast.probes",
    "Attributions": "diffmask_fast.attribution",
    "explain": "diffmask_fast.attribution.explain",
    "attribute": "diffmask_fast.attribution.attribute",
    "state_moments": "diffmask_fast.moments",
    "Examples": "diffmask_fast.data",
    "encode": "diffmask_fast.data",
    "encode_images": "diffmask_fast.images",
    "Recipe": "diffmask_fast.training.recipe",
    "fresh_probe": "diffmask_fast.training.trainer",
    "train_probe": "diffmask_fast.training.trainer",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_OF))
