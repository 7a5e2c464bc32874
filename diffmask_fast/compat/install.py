"""Redirect the imports of published code to ours for a run, so that a script goes faster without an edit."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PROJECTS = {
    "diffmask": {
        "diffmask.models.distributions": "diffmask_fast.compat.distributions",
        "diffmask.models.gates": "diffmask_fast.compat.gates",
        "diffmask.utils.getter_setter": "diffmask_fast.compat.getters",
    },
    "vision": {
        "models.gates": "diffmask_fast.compat.vision",
        "utils.distributions": "diffmask_fast.compat.distributions",
        "utils.getters_setters": "diffmask_fast.compat.vision",
    },
    "graphmask": {"code.utils.torch_utils.hard_concrete": "diffmask_fast.compat.graphmask"},
    "edge-pruning": {"modeling.l0": "diffmask_fast.compat.l0", "l0": "diffmask_fast.compat.l0"},
    "l0": {"l0_layers": "diffmask_fast.compat.l0"},
    "cofi": {"models.l0_module": "diffmask_fast.compat.cofi"},
    "subnetwork-probing": {"masked_linear": "diffmask_fast.compat.l0"},
}
"""For each project its modules, as its own code imports them, and ours that has all their names."""

_log = logging.getLogger("diffmask_fast.compat")


class Installed(MetaPathFinder):
    """What `install` returns, also a context manager. `replaced` maps each import that met ours to our module."""

    def __init__(self, modules: dict[str, str]) -> None:
        self.modules = modules
        self.replaced: dict[str, str] = {}

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        lines = [f"{name} is {ours}" for name, ours in self.replaced.items()]
        return "\n".join(lines) or f"none of {', '.join(self.modules)} was imported"

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Ours(self)) if fullname in self.modules else None

    def remove(self) -> None:
        """End the redirection: later imports get the published modules. What was imported from ours stays in use."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in self.replaced:
            module = sys.modules.get(name)
            if module is None or not isinstance(module.__loader__, _Ours):
                continue
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if vars(sys.modules.get(package, ModuleType(""))).get(last) is module:
                delattr(sys.modules[package], last)


class _Ours(Loader):
    """Fills a module of the published name with the names of ours."""

    def __init__(self, installed: Installed) -> None:
        self.installed = installed

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        ours = self.installed.modules[name]
        found = vars(importlib.import_module(ours))
        vars(module).update({key: value for key, value in found.items() if not key.startswith("__")})
        self.installed.replaced[name] = ours
        _log.info("%s is %s", name, ours)


def install(project: str = "diffmask") -> Installed:
    """From now on, imports of a published project's gate, distribution and getter/setter modules get ours.

    Call it before the project is imported. Its package must be importable as before: only these modules of it are
    replaced. Each replacement is logged (INFO, logger "diffmask_fast.compat") and kept in the handle's `replaced`.

    Args:
        project: one of `PROJECTS`: "diffmask", or "vision", "graphmask", "edge-pruning", "l0", "cofi",
            "subnetwork-probing".

    Returns:
        The handle; `remove()`, or the end of its `with` block, undoes it.

    Raises:
        ValueError: an unknown project.
        RuntimeError: one of its modules is imported already, so that others may hold its classes.

    Example:
        >>> from diffmask_fast.compat import install
        >>> with install() as installed:
        ...     import diffmask.models.question_answering_squad_diffmask
        >>> print(installed)
        diffmask.models.gates is diffmask_fast.compat.gates
    """
    if project not in PROJECTS:
        raise ValueError(f"project is {project!r}, expected one of {', '.join(PROJECTS)}")
    modules = PROJECTS[project]
    for name in modules:
        module = sys.modules.get(name)
        if isinstance(getattr(module, "__loader__", None), _Ours):
            raise RuntimeError(f"{name} is redirected already: remove() the handle of the first install")
        if module is not None:
            raise RuntimeError(f"{name} is imported already: call install() before anything imports it")
    installed = Installed(modules)
    sys.meta_path.insert(0, installed)
    return installed
