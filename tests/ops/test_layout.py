"""Rows found through a layout are the rows of the tensors."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffmask_fast.ops.layout import plan


def strided(*shape: int) -> torch.Tensor:
    """A tensor of distinct numbers whose outer dims can't be merged."""
    padded = torch.arange(float(torch.Size([n + 1 for n in shape]).numel())).view([n + 1 for n in shape])
    return padded[tuple(slice(0, n) for n in shape)]


CASES = {
    "vector": ((3, 7, 5), (5,)),
    "position": ((3, 7, 5), (7, 5)),
    "batch": ((3, 7, 5), (3, 1, 5)),
    "every row": ((3, 7, 5), (3, 7, 5)),
    "one row": ((1, 5), (5,)),
    "between": ((2, 3, 4, 5), (2, 1, 4, 5)),
    "around": ((2, 3, 4, 5), (1, 3, 1, 5)),
    "five dims in turn": ((2, 3, 2, 3, 2, 5), (2, 1, 2, 1, 2, 5)),
    "three of a kind": ((2, 3, 4, 5), (5,)),
}


@pytest.mark.parametrize("make", [torch.randn, strided], ids=["dense", "strided"])
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_found_once_with_its_baseline(name, make):
    shape, baseline_shape = CASES[name]
    states, baseline, grad = make(*shape), torch.randn(baseline_shape), make(*shape).flip(0)
    layout = plan(states, baseline, grad)
    assert layout.groups * layout.members == states[..., 0].numel()
    rows, rows_grad = states.reshape(-1, 5), grad.reshape(-1, 5)
    rows_baseline = baseline.expand(shape).reshape(-1, 5)
    seen = []
    for place in itertools.product(*(range(dim.size) for dim in layout.dims)):
        row, at, at_grad = (sum(i * dim[n] for i, dim in zip(place, layout.dims, strict=True)) for n in (1, 2, 3))
        group = place[0] * layout.dims[1].size + place[1]
        seen.append(row)
        assert torch.equal(layout.states.as_strided((5,), (1,), layout.states.storage_offset() + at), rows[row])
        assert torch.equal(layout.grad.as_strided((5,), (1,), layout.grad.storage_offset() + at_grad), rows_grad[row])
        assert torch.equal(layout.baseline.reshape(-1, 5)[group], rows_baseline[row])
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("name", ["vector", "position", "batch", "every row"])
def test_strided_states_are_not_copied(name):
    shape, baseline_shape = CASES[name]
    states = strided(*shape)
    assert plan(states, torch.zeros(baseline_shape)).states is states


def test_dense_rows_that_share_a_baseline_are_one_dim():
    layout = plan(torch.zeros(3, 7, 5), torch.zeros(5))
    assert [dim.size for dim in layout.dims] == [1, 1, 1, 21]


def test_a_last_dim_of_size_one_gets_stride_one():
    states = torch.zeros(2, 1, 5).transpose(1, 2)
    assert plan(states, torch.zeros(1)).states.stride(-1) == 1
