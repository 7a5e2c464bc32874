"""Which implementation runs an operation: the tables, what works here, and the choice.

A backend is a module with ``unavailable() -> str | None`` and an operation's ``_forward`` and ``_backward``
(signatures in ``reference`` for ``gate_mix``, in ``probe_reference`` for ``probe_logits``). It is imported when it is
first considered.
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
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    """Device type and dtypes of the states that it takes; None: any."""

    modules: dict[str, str]
    """The module of each operation that it has."""


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = {
    "reference": Backend(
        None,
        None,
        {"gate_mix": "diffmask_fast.ops.reference", "probe_logits": "diffmask_fast.ops.probe_reference"},
    ),
    "cpu": Backend(
        "cpu", _FLOATS, {"gate_mix": "diffmask_fast.ops.cpu", "probe_logits": "diffmask_fast.ops.probe_cpu"}
    ),
    "cuda": Backend("cuda", _FLOATS, {"gate_mix": "diffmask_fast.ops.cuda"}),
    "triton": Backend(
        "cuda", _FLOATS, {"gate_mix": "diffmask_fast.ops.triton", "probe_logits": "diffmask_fast.ops.probe_triton"}
    ),
}
"""Of those for one device, auto prefers the one that stands first."""


def available() -> dict[str, str | None]:
    """For each backend the reason why it can't run on this machine, or None where it can."""
    return {name: load(name).unavailable() for name in BACKENDS}


@functools.cache
def load(name: str, operation: str = "gate_mix") -> ModuleType:
    return importlib.import_module(BACKENDS[name].modules[operation])


def choose(name: str, device: str, dtype: torch.dtype, operation: str = "gate_mix") -> str:
    """The name of the backend of an operation for states of a device type and dtype.

    ``"auto"`` is what the environment variable DIFFMASK_FAST_BACKEND names, if that has the operation, or else the
    first backend made for the device that can run, or else the reference. Raises ValueError for an unknown name, and
    RuntimeError with the reason where a backend asked for by name can't run.
    """
    names = [known for known, backend in BACKENDS.items() if operation in backend.modules]
    asked_by = "backend="
    if name == "auto":
        asked_by = f"{ENVIRONMENT}="
        name = os.environ.get(ENVIRONMENT) or "auto"
        if name in BACKENDS and name not in names:
            name = "auto"
    if name == "auto":
        return _automatic(names, device, dtype, operation)
    if name not in names:
        raise ValueError(f"{asked_by}{name!r} is not a backend of {operation}, expected auto, {' or '.join(names)}")
    reason = _refusal(name, device, dtype) or load(name, operation).unavailable()
    if reason is not None:
        raise RuntimeError(f"{asked_by}{name!r} can't run: {reason}")
    return name


# Dynamo takes the answer into the graph as a constant instead of tracing how it is found. This is all that
# torch.compiler.assume_constant_result does, less its import of Dynamo, which takes a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(names: list[str], device: str, dtype: torch.dtype, operation: str) -> str:
    reasons = []
    chosen = "reference"
    for name in names:
        if BACKENDS[name].device != device or _refusal(name, device, dtype) is not None:
            continue
        reason = load(name, operation).unavailable()
        if reason is None:
            chosen = name
            break
        reasons.append(f"{name!r} can't run: {reason}")
    if reasons:
        slow = "slow " if chosen == "reference" else ""
        _warn_once(f"{operation} runs its {slow}{chosen} backend, because {'; '.join(reasons)}")
    return chosen


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    backend = BACKENDS[name]
    interpreted = name == "triton" and device == "cpu" and load(name).interpreting()
    if backend.device not in (None, device) and not interpreted:
        hint = "; TRITON_INTERPRET=1 in the environment lets it take those too, slowly" if name == "triton" else ""
        return f"it takes states on {backend.device}, and these are on {device}{hint}"
    if backend.dtypes is not None and dtype not in backend.dtypes:
        return f"it takes states of {', '.join(map(str, backend.dtypes))}, and these are {dtype}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
