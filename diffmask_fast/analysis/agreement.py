"""Do several runs say the same about the same texts? Another seed should not give another explanation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.report import require_many


class Agreement(NamedTuple):
    """How alike R runs are at each of S sites, on average over texts and over pairs of runs.

    Attributes:
        site_names: the sites.
        pairs: of runs.
        spearman: (S,) float64, rank correlation of P(keep) over the tokens of a text; NaN where it is never defined.
        defined: (S,) float64, the share of texts and pairs for which it is: neither run gives all tokens the same.
        jaccard: (S,) float64, tokens that both keep (P(keep) above 0.5) over tokens that either keeps; 1 where neither
            keeps any.
        same: (S,) float64, the share of tokens that both keep or both drop.
    """

    site_names: tuple[str, ...]
    pairs: int
    spearman: Tensor
    defined: Tensor
    jaccard: Tensor
    same: Tensor


def agreement(runs: Sequence[Attributions]) -> Agreement:
    """Compare runs that explained the same texts at the same sites.

    Raises:
        TypeError: something that is no `Attributions`.
        ValueError: fewer than two runs, no texts, other texts or sites; the message says which run and where.
    """
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} runs: give at least two to compare")
    for run in runs:
        require_many(run)
    for number, run in enumerate(runs):
        _check_alike(runs[0], run, number)
    pairs = list(combinations(range(len(runs)), 2))
    sums = torch.zeros(4, len(runs[0].site_names), dtype=torch.float64)
    for texts in zip(*runs, strict=True):
        keeps = [text.keep.double() for text in texts]
        ranks = [centred_ranks(keep) for keep in keeps]
        for one, other in pairs:
            lengths = ranks[one].norm(dim=0) * ranks[other].norm(dim=0)
            defined = lengths > 0
            correlation = (ranks[one] * ranks[other]).sum(0) / lengths.where(defined, 1)
            a, b = keeps[one] > KEPT_ABOVE, keeps[other] > KEPT_ABOVE
            either = (a | b).sum(0)
            jaccard = ((a & b).sum(0).double() / either.clamp(min=1)).where(either > 0, 1)
            sums += torch.stack([correlation.where(defined, 0), defined, jaccard, (a == b).double().mean(0)])
    total = len(pairs) * len(runs[0])
    spearman, defined, jaccard, same = sums
    return Agreement(
        runs[0].site_names, len(pairs), spearman / defined.where(defined > 0, torch.nan), defined / total,
        jaccard / total, same / total,
    )  # fmt: skip


def centred_ranks(values: Tensor) -> Tensor:
    """(T, S) -> (T, S) float64: ranks along T less their mean; values alike share the mean of their ranks."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(values.numpy(), axis=0)) - (len(values) + 1) / 2


def _check_alike(first: Attributions, run: Attributions, number: int) -> None:
    if run.site_names != first.site_names:
        raise ValueError(
            f"run {number} has the sites {', '.join(run.site_names)} and run 0 {', '.join(first.site_names)}: compare "
            "runs of the same sites"
        )
    if len(run) != len(first):
        raise ValueError(f"run {number} has {len(run)} texts and run 0 {len(first)}: compare runs on the same texts")
    for text, (here, there) in enumerate(zip(run.tokens, first.tokens, strict=True)):
        if here != there:
            raise ValueError(
                f"text {text} of run {number} begins with {' '.join(here[:12])} and that of run 0 with "
                f"{' '.join(there[:12])}: compare runs on the same texts, in the same order"
            )
