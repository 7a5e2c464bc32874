"""Where a model's hidden states are at home: their mean and spread at each site, in one pass over some texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.progress import progress
from diffmask_fast.sites import patch


class Moments(NamedTuple):
    """Of the states of one site over real tokens: `mean` and `std`, (H,) in float32."""

    mean: Tensor
    std: Tensor


@torch.no_grad()
def state_moments(
    model: nn.Module,
    examples: Examples,
    sites: Sequence[int] | None = None,
    *,
    batch_size: int = 16,
    show_progress: bool = False,
) -> dict[int, Moments]:
    """Mean and standard deviation of the states at `sites` (all by default), over the real tokens of `examples`.

    Nothing is kept but sums, in float64, which are shifted by the first batch's mean so that none cancels.

    Raises:
        ValueError: no examples, or a site that there isn't.
    """
    if not len(examples):
        raise ValueError("examples is empty: give at least one")
    device = next(model.parameters()).device
    sums: dict[int, list[Tensor]] = {}
    count = 0
    with frozen(model), patch(model) as patched:
        chosen = range(len(patched.sites)) if sites is None else sites
        for numbers in progress(examples.batches(batch_size), "states", show_progress):
            collated = examples.collate([examples[i] for i in numbers])
            inputs = {name: value.to(device) for name, value in collated.items()}
            real = inputs["attention_mask"].bool()
            count += int(real.sum())
            for site, state in patched.run(inputs, capture=chosen).states.items():
                rows = state[real].double()
                if site not in sums:
                    sums[site] = [rows.mean(0), torch.zeros_like(rows[0]), torch.zeros_like(rows[0])]
                shift, first, second = sums[site]
                first += (rows - shift).sum(0)
                second += (rows - shift).square().sum(0)
    return {site: _moments(count, *parts) for site, parts in sums.items()}


def _moments(count: int, shift: Tensor, first: Tensor, second: Tensor) -> Moments:
    variance = second / count - (first / count).square()
    return Moments((shift + first / count).float(), variance.clamp(min=0).sqrt().float())
