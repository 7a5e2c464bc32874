from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and small models: DIFFMASK_FAST_SHARED, or ``shared`` beside the repository."""
    path = Path(os.environ.get("DIFFMASK_FAST_SHARED") or Path(__file__).parents[2] / "shared")
    if path.is_dir():
        return path
    reason = f"there is no folder {path}: set DIFFMASK_FAST_SHARED to the folder of real data"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
