"""Erasure by exact search: the fewest tokens whose states, all others replaced, keep the prediction.

What De Cao et al. 2020 call exact search, after Li et al. 2016 ("Understanding neural networks through representation
erasure"). Nothing is assumed about the model: a subset that holds one that keeps the prediction need not keep it
itself, so no subset can be ruled out by another one. What does save work is the order by size, which ends at the first
size with a solution, and tokens whose state is the baseline already, which no smallest subset holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice

import torch
from torch import Tensor

from diffmask_fast.attribution.batch import Batch, check_finite
from diffmask_fast.attribution.methods import Found
from diffmask_fast.moments import Moments

EQUAL = 1e-5
"""Nats. Divergences are compared in steps of this, which rounding hardly reaches, and then by which tokens come first:
so that the choice among subsets that do the same depends neither on the batch nor on the order of the search."""

Subset = tuple[int, ...]  # places of tokens in their text, ascending
Rank = tuple[int, Subset]  # the lower the better


@dataclass(eq=False)
class Search:
    """The search for one text.

    Attributes:
        text: its row in the batch.
        length: its tokens.
        free: the tokens to choose from.
        exhaustive: whether all subsets are tried, or those that the beam leads to.
        seen: of a beam, the subsets that were run.
        tried: of a beam, those of the current round.
        best: of the current round, the best one that keeps the prediction.
        found: the smallest one so far that keeps it.
        forwards: how many were run.
    """

    text: int
    length: int
    free: Subset
    exhaustive: bool
    seen: set[Subset] = field(default_factory=set)
    tried: list[Rank] = field(default_factory=list)
    best: Rank | None = None
    found: Subset | None = None
    forwards: int = 0

    def larger(self, size: int, beam: int) -> Iterable[Subset]:
        """The subsets of that size to be tried after those one smaller: without a beam, and up to one token, all."""
        if self.exhaustive or size < 2:
            return combinations(self.free, size)
        front = [subset for _, subset in sorted(self.tried)[:beam]]
        return {tuple(sorted((*subset, token))) for subset in front for token in self.free if token not in subset}

    def smaller(self) -> list[Subset]:
        """What is found without one of its tokens, as far as that was not tried yet."""
        assert self.found is not None
        return [subset for subset in combinations(self.found, len(self.found) - 1) if subset not in self.seen]

    def note(self, subset: Subset, divergence: float, keeps: bool) -> None:
        """That a subset was run, and what came out."""
        self.forwards += 1
        rank = (round(divergence / EQUAL), subset)
        if keeps and (self.best is None or rank < self.best):
            self.best = rank
        if not self.exhaustive:
            self.seen.add(subset)
            self.tried.append(rank)

    @property
    def proven(self) -> bool:
        """Whether all subsets of up to the size of what was found were run."""
        assert self.found is not None
        return self.exhaustive or len(self.found) < 2


def erasure(
    batch: Batch,
    site: int,
    home: Moments,
    exhaustive_to: int = 12,
    beam: int = 4,
    tolerance: float | None = None,
    always: str | None = None,
    budget: int = 128,
) -> Found:
    """The smallest subset of tokens whose states at `site`, all others replaced by the baseline, keep the prediction.

    All subsets are tried by ascending size, none and all tokens included, up to the first size at which one keeps the
    prediction; among those of that size that do, the one with the smallest divergence is taken. There is always one:
    the whole text.

    A text with more tokens to choose from than `exhaustive_to` has a beam search instead. Forward: all subsets of no
    and of one token, then those that add one token to the `beam` subsets of the last size with the smallest divergence,
    up to the first size at which one keeps the prediction. Back: as long as some token can be taken away, the one
    whose loss leaves the smallest divergence is. What comes out keeps the prediction and may not be the smallest.

    Args:
        batch, site, home: what is explained; `home.mean` is the baseline.
        exhaustive_to: tokens to choose from up to which all subsets are tried; the time doubles with each.
        beam: subsets of each size that a beam search goes on from.
        tolerance: nats; what keeps the prediction has the same answer, and with this a divergence of at most so much
            beside.
        always: "special" keeps the tokenizer's own tokens, such as [CLS] and [SEP], in every subset. By default they
            are tokens like all others, as for DiffMask: above the lowest layers they often carry the answer.
        budget: rows that the model sees at once, of one text or several. It does not change the result.

    Returns:
        `Found` with `keep` 0 or 1, and in its details, (B,) each: "size", the number of tokens kept; "proven", 1 where
        nothing smaller keeps the prediction, nor another of that size with a smaller divergence, because all were run
        (of a beam search so only up to one token), else 0; "forwards", the rows that were run.

    Raises:
        ValueError: an option out of its range; predictions that hold NaN or infinity.
    """
    _check(exhaustive_to, beam, tolerance, always, budget)
    fixed = batch.special if always == "special" else torch.zeros_like(batch.special)
    differs = (batch.states[site] != home.mean.to(batch.states[site])).any(-1)
    free = (differs & batch.real.bool() & ~fixed).cpu()
    searches = []
    for text, length in enumerate(batch.real.sum(-1).tolist()):
        tokens = tuple(free[text].nonzero().squeeze(1).tolist())
        searches.append(Search(text, length, tokens, len(tokens) <= exhaustive_to))

    def run(asked: Iterable[tuple[Search, Iterable[Subset]]]) -> None:
        for chunk in _chunks(asked, budget):
            _run(batch, site, home.mean, fixed, tolerance, chunk)

    _ascend(searches, beam, run)
    _descend([search for search in searches if not search.proven], run)
    keep = fixed.float()
    for search in searches:
        keep[search.text, list(search.found or ())] = 1
    details = {
        "forwards": keep.new_tensor([search.forwards for search in searches]),
        "proven": keep.new_tensor([search.proven for search in searches]),
        "size": keep.sum(-1),
    }
    return Found(keep=keep, details=details)


Runner = Callable[[Iterable[tuple[Search, Iterable[Subset]]]], None]


def _ascend(searches: list[Search], beam: int, run: Runner) -> None:
    """From the empty subset up, size by size, for all texts together."""
    searching, size = searches, 0
    while searching:
        for search in searching:
            if size == len(search.free):
                search.found = search.free  # the whole text, which needs no run
        searching = [search for search in searching if search.found is None]
        asked = [(search, search.larger(size, beam)) for search in searching]
        for search in searching:
            search.tried = []
        run(asked)
        for search in searching:
            search.found = search.best and search.best[1]
        searching = [search for search in searching if search.found is None]
        size += 1


def _descend(searches: list[Search], run: Runner) -> None:
    """From what is found down, token by token, while there is one to take away."""
    while searches:
        for search in searches:
            search.best = None
        run((search, search.smaller()) for search in searches)
        searches = [search for search in searches if search.best is not None]
        for search in searches:
            assert search.best is not None
            search.found = search.best[1]


Row = tuple[Search, Subset]


def _chunks(asked: Iterable[tuple[Search, Iterable[Subset]]], budget: int) -> Iterator[list[Row]]:
    """The rows in lists of at most `budget`, texts of similar length together."""
    by_length = sorted(asked, key=lambda one: one[0].length)
    rows = ((search, subset) for search, subsets in by_length for subset in subsets)
    while chunk := list(islice(rows, budget)):
        yield chunk


def _run(batch: Batch, site: int, baseline: Tensor, fixed: Tensor, tolerance: float | None, chunk: list[Row]) -> None:
    """What the model says with the states of each subset, noted in its search."""
    texts = torch.tensor([search.text for search, _ in chunk], device=fixed.device)
    gates = fixed[texts, : max(search.length for search, _ in chunk)].float()
    rows = [row for row, (_, subset) in enumerate(chunk) for _ in subset]
    gates[rows, [token for _, subset in chunk for token in subset]] = 1
    prediction = batch.predict(site, batch.mixed(site, gates, baseline, texts), texts)
    divergence = batch.divergence(prediction, texts)
    check_finite(divergence, f"a masked prediction of site {site} ({batch.patched.sites[site].name})")
    keeps = batch.keeps(prediction, texts)
    if tolerance is not None:
        keeps &= divergence <= tolerance
    for (search, subset), nats, same in zip(chunk, divergence.tolist(), keeps.tolist(), strict=True):
        search.note(subset, nats, same)


def _check(exhaustive_to: int, beam: int, tolerance: float | None, always: str | None, budget: int) -> None:
    for name, value, least in (("exhaustive_to", exhaustive_to, 0), ("beam", beam, 1), ("budget", budget, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number, {least} or more")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected nats, 0 or more, or None for the same answer alone")
    if always not in (None, "special"):
        raise ValueError(f'always is {always!r}; expected "special", or None where every token may be dropped')
