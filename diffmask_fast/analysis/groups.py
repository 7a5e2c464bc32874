"""Averages over groups of tokens: at how many sites they are kept, and at each site which share of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmask_fast.attribution import SEGMENT_NAMES, Attributions
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.data import FIRST, SECOND
from diffmask_fast.report import require_many


class Group(NamedTuple):
    """At how many sites the tokens of a group are kept, on average over them.

    Attributes:
        name: of the group.
        tokens, texts: how many it has, in how many texts.
        expected: mean over tokens of the sum over sites of P(keep).
        expected_error: its standard error, None where there is but one text.
        kept: mean over tokens of the number of sites with P(keep) above 0.5.
        kept_error: its standard error.

    A standard error takes the texts as drawn and not the tokens, because tokens of one text are alike: it is
    sqrt(G / (G - 1) * sum over the G texts of (sum over the text's tokens of (value - mean)) ** 2) / tokens, which is
    the usual one where each text has one token of the group.
    """

    name: str
    tokens: int
    texts: int
    expected: float
    expected_error: float | None
    kept: float
    kept_error: float | None


def kept_sites(attributions: Attributions, labels: Sequence[Any]) -> list[Group]:
    """The groups of tokens with the same label, those first that are kept at the most sites.

    Args:
        attributions: at least one text.
        labels: one per token, text after text; tokens with None are left out.

    Raises:
        TypeError, ValueError: no texts, not as many labels as tokens, or nothing but None.
    """
    require_many(attributions)
    if len(labels) != len(attributions.keep):
        raise ValueError(f"got {len(labels)} labels and {len(attributions.keep)} tokens: give one for each token")
    rows: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        if label is not None:
            rows.setdefault(label, []).append(row)
    if not rows:
        raise ValueError("no token has a label: there is nothing to average")
    owner = owners(attributions)
    expected = attributions.keep.double().sum(-1)
    kept = (attributions.keep > KEPT_ABOVE).double().sum(-1)
    groups = []
    for label, own in rows.items():
        index = torch.tensor(own)
        texts = int(owner[index].unique().numel())
        values = (mean_and_error(each[index], owner[index]) for each in (expected, kept))
        (mean, error), (kept_mean, kept_error) = values
        groups.append(Group(str(label), len(own), texts, mean, error, kept_mean, kept_error))
    return sorted(groups, key=lambda group: -group.expected)


def mean_and_error(values: Tensor, owner: Tensor) -> tuple[float, float | None]:
    """The mean of (R,) float64 values and its standard error, see `Group`; `owner` (R,) is the text of each."""
    mean = values.mean()
    texts, number = owner.unique(return_inverse=True)
    if len(texts) < 2:
        return mean.item(), None
    sums = torch.zeros(len(texts), dtype=torch.float64).index_add_(0, number, values - mean)
    return mean.item(), math.sqrt(sums.square().sum().item() * len(texts) / (len(texts) - 1)) / len(values)


class Share(NamedTuple):
    """Which share of the tokens of a region each site needs, tokens of a text first and then texts.

    Attributes:
        name: of the region.
        texts: how many have tokens there.
        expected: (S,) float32, mean P(keep).
        kept: (S,) float32, the share of tokens with P(keep) above 0.5.
    """

    name: str
    texts: int
    expected: Tensor
    kept: Tensor


def shares(attributions: Attributions, regions: Mapping[str, Tensor]) -> list[Share]:
    """Regions by site, see `Share`; one that no text has is left out.

    Args:
        attributions: at least one text.
        regions: by name, (sum T_i,) bool: which tokens belong to it. They may overlap.

    Raises:
        TypeError, ValueError: no texts, or a region of another shape or dtype.
    """
    require_many(attributions)
    owner = owners(attributions)
    found = []
    for name, chosen in regions.items():
        if chosen.dtype != torch.bool or chosen.shape != attributions.segments.shape:
            raise ValueError(
                f"region {name}: expected torch.bool {tuple(attributions.segments.shape)}, one entry per token, got "
                f"{chosen.dtype} {tuple(chosen.shape)}"
            )
        counts = torch.bincount(owner[chosen], minlength=len(attributions))
        some = counts > 0
        if not some.any():
            continue
        means = []
        for values in (attributions.keep, attributions.keep > KEPT_ABOVE):
            sums = torch.zeros(len(attributions), values.shape[1], dtype=torch.float64)
            sums.index_add_(0, owner[chosen], values[chosen].double())
            means.append((sums[some] / counts[some, None]).mean(0).float())
        found.append(Share(name, int(some.sum()), *means))
    return found


def segment_regions(
    attributions: Attributions, answer: Tensor | None = None, right: Sequence[bool] | None = None
) -> dict[str, Tensor]:
    """The regions of `shares`: special tokens, question and passage, and the answer in it.

    Args:
        attributions: whose tokens they are.
        answer: (sum T_i,) bool, the tokens of the gold answer, which are also the passage's.
        right: for each text, whether the model's own prediction is right; the answer is then split by that as well.

    Raises:
        ValueError: `right` has not an entry for each text.
    """
    names = {0: SEGMENT_NAMES[0], FIRST: SEGMENT_NAMES[1], SECOND: SEGMENT_NAMES[2]}
    if not (attributions.segments == SECOND).any():
        names[FIRST] = "text"
    regions = {name: attributions.segments == segment for segment, name in names.items()}
    if answer is not None:
        regions["answer"] = answer
        if right is not None:
            if len(right) != len(attributions):
                raise ValueError(f"right has {len(right)} entries for {len(attributions)} texts: give one for each")
            correct = torch.tensor(list(right), dtype=torch.bool)[owners(attributions)]
            regions["answer, model right"] = answer & correct
            regions["answer, model wrong"] = answer & ~correct
    return regions


def largest_first(attributions: Attributions) -> Tensor:
    """(S,) float32: in which share of the texts the first token, usually [CLS], has by itself the largest `keep`.

    Where another token has as much, as where a probe is sure of several, the first one is not counted.

    Raises:
        TypeError, ValueError: no texts.
    """
    require_many(attributions)
    totals = torch.zeros(len(attributions.site_names))
    for text in attributions:
        others = text.keep[1:].amax(0) if len(text) > 1 else torch.full_like(totals, -1.0)
        totals += text.keep[0] > others
    return totals / len(attributions)


def owners(attributions: Attributions) -> Tensor:
    """(sum T_i,) int64: the number of each token's text."""
    return torch.repeat_interleave(torch.arange(len(attributions)), attributions.lengths)
