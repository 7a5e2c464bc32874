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
    module: str
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    """Device type and dtypes of the states that it takes; None: any."""


BACKENDS = {
    "reference": Backend("diffmask_fast.ops.reference", None, None),
    "cpu": Backend("diffmask_fast.ops.cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16)),
}
PROBE_BACKENDS = {
    "reference": Backend("diffmask_fast.ops.probe_reference", None, None),
    "cpu": Backend("diffmask_fast.ops.probe_cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16)),
    "triton": Backend("diffmask_fast.ops.probe_triton", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
}
OPERATIONS = {"gate_mix": BACKENDS, "probe_logits": PROBE_BACKENDS}


def available() -> dict[str, str | None]:
    """For each backend the reason why it can't run on this machine, or None where it can."""
    return {name: load(name).unavailable() for name in BACKENDS}


@functools.cache
def load(name: str, operation: str = "gate_mix") -> ModuleType:
    return importlib.import_module(OPERATIONS[operation][name].module)


def choose(name: str, device: str, dtype: torch.dtype, operation: str = "gate_mix") -> str:
    """The name of the backend of an operation for states of a device type and dtype.

    ``"auto"`` is what the environment variable DIFFMASK_FAST_BACKEND names, or else the backend made for the
    device, or else the reference. Raises ValueError for an unknown name, and RuntimeError with the reason
    where a backend asked for by name can't run.
    """
    asked_by = "backend="
    if name == "auto":
        asked_by = f"{ENVIRONMENT}="
        name = os.environ.get(ENVIRONMENT) or "auto"
        if name in BACKENDS and name not in OPERATIONS[operation]:
            name = "auto"  # one name for all operations, and not every backend has all of them
    if name == "auto":
        return _automatic(device, dtype, operation)
    table = OPERATIONS[operation]
    if name not in table:
        raise ValueError(f"{asked_by}{name!r} is not a backend, expected auto, {' or '.join(table)}")
    reason = _refusal(table[name], device, dtype) or _unavailable(table[name])
    if reason is not None:
        raise RuntimeError(f"{asked_by}{name!r} can't run: {reason}")
    return name


# Dynamo takes the answer into the graph as a constant instead of tracing how it is found. This is all that
# torch.compiler.assume_constant_result does, less its import of Dynamo, which takes a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(device: str, dtype: torch.dtype, operation: str) -> str:
    for name, backend in OPERATIONS[operation].items():
        if backend.device is None or _refusal(backend, device, dtype) is not None:
            continue
        reason = _unavailable(backend)
        if reason is None:
            return name
        _warn_once(f"{operation} runs its slow reference backend, because {name!r} can't run: {reason}")
    return "reference"


def _refusal(backend: Backend, device: str, dtype: torch.dtype) -> str | None:
    if backend.device not in (None, device):
        return f"it takes states on {backend.device}, and these are on {device}"
    if backend.dtypes is not None and dtype not in backend.dtypes:
        return f"it takes states of {', '.join(map(str, backend.dtypes))}, and these are {dtype}"
    return None


def _unavailable(backend: Backend) -> str | None:
    return importlib.import_module(backend.module).unavailable()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
