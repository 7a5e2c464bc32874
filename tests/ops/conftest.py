from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that an output that nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


class Case(NamedTuple):
    states: Tensor
    logits: Tensor
    baseline: Tensor
    seed: Tensor


@pytest.fixture
def case() -> Callable[..., Case]:
    """Makes inputs of `gate_mix`, the same each time."""

    def make(
        leading: tuple[int, ...] = (3, 7),
        width: int = 37,
        gates: int = 4,
        baseline: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return Case(
            normal(*leading, width).to(dtype).requires_grad_(),
            (normal(*leading, gates) * 2 + 1).to(logits_dtype).requires_grad_(),
            normal(*(baseline or (width,))).to(logits_dtype).requires_grad_(),
            torch.tensor([1234567890123456789 + seed, -5]),
        )

    return make
