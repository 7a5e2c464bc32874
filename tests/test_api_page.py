"""docs/api.md says what the docstrings say, and every public name has one."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def make_api() -> Any:
    for needed in ("transformers", "accelerate"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_prints(make_api: Any) -> None:
    assert (DOCS / "api.md").read_text() == make_api.page(), "run: python docs/make_api.py > docs/api.md"


def test_every_public_name_has_a_docstring(make_api: Any) -> None:
    bare = [
        f"{path}.{name}"
        for path in make_api.MODULES
        for name in make_api.public_names(importlib.import_module(path))
        if not (getattr(importlib.import_module(path), name).__doc__ or "").strip()
    ]
    assert not bare
