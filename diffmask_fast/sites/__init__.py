"""Where a model's hidden states are read and replaced: `registry` is the data, `patching` the hooks."""

from __future__ import annotations

from .patching import Patched, Run, patch
from .registry import Site, register_sites, sites_of

__all__ = ["Patched", "Run", "Site", "patch", "register_sites", "sites_of"]
