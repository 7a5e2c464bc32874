"""Which implementation runs `gate_mix`: the table, what works here, and the choice.

A backend is a module with ``unavailable() -> str | None``, ``gate_mix_forward`` and ``gate_mix_backward``
(signatures in ``reference``). It is imported when it is first considered.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

ENVIRONMENT = "DIFFMASK_FAST_BACKEND"


class Backend(NamedTuple):
    module: str
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    """Device type and dtypes of the states that it takes; None: any."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = {
    "reference": Backend("diffmask_fast.ops.reference", None, None),
    "cpu": Backend("diffmask_fast.ops.cpu", "cpu", _FLOATS),
    "cuda": Backend("diffmask_fast.ops.cuda", "cuda", _FLOATS),
}
"""Of those for one device, auto prefers the one that stands first."""


def available() -> dict[str, str | None]:
    """For each backend the reason why it can't run on this machine, or None where it can."""
    return {name: load(name).unavailable() for name in BACKENDS}


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name].module)


def choose(name: str, device: str, dtype: torch.dtype) -> str:
    """The name of the backend for states of a device type and dtype.

    ``"auto"`` is what the environment variable DIFFMASK_FAST_BACKEND names, or else the backend made for the
    device, or else the reference. Raises ValueError for an unknown name, and RuntimeError with the reason
    where a backend asked for by name can't run.
    """
    asked_by = "backend="
    if name == "auto":
        asked_by = f"{ENVIRONMENT}="
        name = os.environ.get(ENVIRONMENT) or "auto"
    if name == "auto":
        return _automatic(device, dtype)
    if name not in BACKENDS:
        raise ValueError(f"{asked_by}{name!r} is not a backend, expected auto, {' or '.join(BACKENDS)}")
    reason = _refusal(name, device, dtype) or load(name).unavailable()
    if reason is not None:
        raise RuntimeError(f"{asked_by}{name!r} can't run: {reason}")
    return name


# Dynamo takes the answer into the graph as a constant instead of tracing how it is found. This is all that
# torch.compiler.assume_constant_result does, less its import of Dynamo, which takes a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(device: str, dtype: torch.dtype) -> str:
    reasons = []
    chosen = "reference"
    for name, backend in BACKENDS.items():
        if backend.device != device or _refusal(name, device, dtype) is not None:
            continue
        reason = load(name).unavailable()
        if reason is None:
            chosen = name
            break
        reasons.append(f"{name!r} can't run: {reason}")
    if reasons:
        slow = "slow " if chosen == "reference" else ""
        _warn_once(f"gate_mix runs its {slow}{chosen} backend, because {'; '.join(reasons)}")
    return chosen


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    backend = BACKENDS[name]
    if backend.device not in (None, device):
        return f"it takes states on {backend.device}, and these are on {device}"
    if backend.dtypes is not None and dtype not in backend.dtypes:
        return f"it takes states of {', '.join(map(str, backend.dtypes))}, and these are {dtype}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
