from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def outputs_start_as_nan(poisoned_memory: None) -> None:
    """An output that nobody writes shows."""
