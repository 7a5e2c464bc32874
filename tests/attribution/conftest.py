from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def classifier(tiny_bert: Any) -> Any:
    return tiny_bert()


@pytest.fixture(scope="module")
def reader(tiny_bert: Any) -> Any:
    return tiny_bert("ForQuestionAnswering")
