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
}

__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_OF))
