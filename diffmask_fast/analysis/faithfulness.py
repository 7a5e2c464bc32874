"""Does the model really not need what a method says it doesn't? Tokens are masked in the method's order.

A plausible explanation need not be a faithful one (Jacovi & Goldberg 2020): these measures ask the model alone.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffmask_fast import runs
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.batch import Batch, Prediction, check_finite, read_batch
from diffmask_fast.attribution.windows import whole_texts
from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.moments import state_moments
from diffmask_fast.predictions import require_kind
from diffmask_fast.progress import progress
from diffmask_fast.report import require_many
from diffmask_fast.sites import patch, sites_of

SHARES = tuple(tenths / 10 for tenths in range(11))
RATIONALES = (0.01, 0.05, 0.1, 0.2, 0.5)  # DeYoung et al. 2020, section 4.2
RANDOM = "random order"


@dataclass(frozen=True)
class Line:
    """What one order of the tokens does to the predictions, on average over the examples.

    Attributes:
        name: of the method, or `RANDOM`.
        kept_prediction: for each share, how often the prediction stays when so many tokens are masked, the least first.
        divergence: for each share, KL(original || masked) in nats.
        comprehensiveness: for each rationale, by how much the probability of the original answer falls when that share
            of the tokens, the most important ones, is masked. High is good.
        sufficiency: for each rationale, by how much it falls when only these are left. Low is good.
    """

    name: str
    kept_prediction: list[float]
    divergence: list[float]
    comprehensiveness: list[float]
    sufficiency: list[float]

    @property
    def mean_comprehensiveness(self) -> float:
        """The area over the perturbation curve (AOPC): the mean over the rationales."""
        return sum(self.comprehensiveness) / len(self.comprehensiveness)

    @property
    def mean_sufficiency(self) -> float:
        """The same of sufficiency."""
        return sum(self.sufficiency) / len(self.sufficiency)


@dataclass(frozen=True)
class Faithfulness:
    """Several methods on the same examples, their states replaced at the same site, and a random order for control.

    Attributes:
        site: the name of the site whose states are replaced, by their mean.
        examples: how many; each window of a text that was cut counts for itself.
        shares: of masked tokens, for the curves.
        rationales: shares of most important tokens, for comprehensiveness and sufficiency.
        lines: one for each method, and the random order.

    Source: DeYoung et al., ACL 2020 (ERASER), section 4.2, for comprehensiveness and sufficiency.
    """

    site: str
    examples: int
    shares: tuple[float, ...]
    rationales: tuple[float, ...]
    lines: tuple[Line, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON, whole or not at all."""
        runs.write_json(path, asdict(self))


class Step(NamedTuple):
    """One masked prediction: which share of the tokens is masked, the least or the most important ones."""

    share: float
    least: bool


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    examples: Examples,
    attributions: Sequence[Attributions],
    *,
    site: int | str = 0,
    shares: Sequence[float] = SHARES,
    rationales: Sequence[float] = RATIONALES,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
) -> Faithfulness:
    """Mask the states at one site in the order of each method's `keep`, and compare the predictions.

    A share of a text is rounded so that no more is masked than the share of the curves, and no less is a rationale than
    its share. Tokens with the same `keep` come in a random order, that of the control. All real tokens count, special
    ones too. A masked state is the mean state at the site over `examples`, for all methods alike.

    Args:
        model: the model that was explained.
        examples: all texts of the attributions, encoded, in their order.
        attributions: at least one. Of hidden masking, the column of `site` orders the tokens. Input masking replaces
            states at the first site only; of its columns the last one does, which says what no site needs.
        site: the number or name of the site whose states are replaced.
        shares, rationales: see `Faithfulness`; each in [0, 1].
        batch_size: examples a pass; it does not change the result.
        seed: of the random order; what is drawn for an example does not depend on the others.
        show_progress: show a bar with the time left.

    Raises:
        TypeError, ValueError: other texts, a site that a method has not explained, shares outside [0, 1].
    """
    for values, what in ((shares, "shares"), (rationales, "rationales")):
        if not len(values) or not all(0 <= share <= 1 for share in values):
            raise ValueError(f"{what}: expected numbers from 0 to 1, at least one, got {values!r}")
    require_kind(model, examples.kind)
    names = [one.name for one in sites_of(model)]
    number = names.index(site) if site in names else site
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
        raise ValueError(f"the model has no site {site!r}; expected one of {', '.join(names)}")
    keeps = [example_keeps(one, examples, names, number) for one in attributions]
    if not keeps:
        raise ValueError("attributions is empty: give at least one method's")
    steps = [Step(share, True) for share in shares]
    steps += [Step(share, False) for share in rationales] + [Step(1 - share, True) for share in rationales]
    home = state_moments(model, examples, [number], batch_size=batch_size)[number].mean
    device = next(model.parameters()).device
    totals = torch.zeros(len(keeps) + 1, len(steps), 3, dtype=torch.float64)
    asked = 0
    with frozen(model), patch(model) as patched:
        for members in progress(examples.batches(batch_size), "faithfulness", show_progress):
            batch = read_batch(patched, examples, members, [number], device)
            asked += int(batch.asked.sum())
            chance = [random_order(len(examples.tokens[i]), seed, i) for i in members]
            blank = [torch.zeros(len(order)) for order in chance]
            for line, keep in enumerate([*([own[i] for i in members] for own in keeps), blank]):
                ranks = [importance_ranks(*pair) for pair in zip(keep, chance, strict=True)]
                for at, step in enumerate(steps):
                    gates = [open_gates(rank, step) for rank in ranks]
                    padded = nn.utils.rnn.pad_sequence(gates, batch_first=True).to(device)
                    masked = batch.predict(number, batch.mixed(number, padded, home))
                    totals[line, at] += compared(batch, masked).double().sum(0).cpu()
    return Faithfulness(
        names[number],
        len(examples),
        tuple(shares),
        tuple(rationales),
        tuple(
            _line(name, rows, len(shares), len(rationales))
            for name, rows in zip(line_names(attributions), (totals / asked).tolist(), strict=True)
        ),
    )


def _line(name: str, rows: list[list[float]], shares: int, rationales: int) -> Line:
    curve, most, rest = rows[:shares], rows[shares : shares + rationales], rows[shares + rationales :]
    kept, divergence, _ = zip(*curve, strict=True)
    return Line(name, list(kept), list(divergence), [row[2] for row in most], [row[2] for row in rest])


def line_names(attributions: Sequence[Attributions]) -> list[str]:
    """The methods, and the random order. What is masked tells two of one method apart, and else their number does."""
    maskings = Counter(method for method, _ in {(one.method, one.masking) for one in attributions})
    names = [f"{one.method}, {one.masking}" if maskings[one.method] > 1 else one.method for one in attributions]
    named = [name if names.count(name) == 1 else f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]
    return [*named, RANDOM]


def example_keeps(attributions: Attributions, examples: Examples, names: Sequence[str], site: int) -> list[Tensor]:
    """For each example the (T,) `keep` that orders its tokens when the states at `site` are replaced.

    Raises:
        TypeError, ValueError: other texts, or nothing that was said about that site.
    """
    require_many(attributions)
    if attributions.masking == "input":
        if site:
            raise ValueError(
                f"input masking replaces states at {names[0]}, and not at {names[site]}: compare it at {names[0]}"
            )
        column = -1
    elif names[site] in attributions.site_names:
        column = attributions.site_names.index(names[site])
    else:
        explained = ", ".join(attributions.site_names)
        raise ValueError(f"{attributions.method} explained {explained}, and not {names[site]}: choose another site")
    members = whole_texts(examples)
    if len(members) != len(attributions):
        raise ValueError(f"got {len(members)} texts and attributions of {len(attributions)}: give the same texts")
    keeps = []
    for number, (own, text) in enumerate(zip(members, attributions, strict=True)):
        for i in own:
            positions = range(len(text)) if examples.windows is None else examples.windows[i].positions
            if [text.tokens[at] for at in positions if at < len(text)] != examples.tokens[i]:
                raise ValueError(
                    f"text {number} begins with {' '.join(examples.tokens[i][:12])} and its attribution with "
                    f"{' '.join(text.tokens[:12])}: give the texts that were read, in their order"
                )
            keeps.append(text.keep[list(positions), column])
    return keeps


def random_order(length: int, seed: int, example: int) -> Tensor:
    """(T,) int64: the numbers of the tokens in an order that depends on nothing else."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + example)
    return torch.randperm(length, generator=generator)


def importance_ranks(keep: Tensor, chance: Tensor) -> Tensor:
    """(T,) int64: 0 for the least important token, T - 1 for the most; tokens alike come as `chance` has them."""
    order = chance[keep[chance].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def open_gates(ranks: Tensor, step: Step) -> Tensor:
    """(T,) float32, 0 for the tokens that are masked in this step."""
    exact = round(step.share * len(ranks), 6)  # 0.29 * 100 is not 29
    if step.least:
        return (ranks >= math.floor(exact)).float()
    return (ranks < len(ranks) - math.ceil(exact)).float()


def compared(batch: Batch, masked: Prediction) -> Tensor:
    """(B, 3): whether the prediction stays, KL in nats, and by how much the original answer's probability falls (at
    several places their geometric mean, of numbers exp(-KL)). Of examples that have no prediction there is no row."""
    for table in masked.tables:
        check_finite(table, "a masked prediction")
    divergence = batch.divergence(masked).clamp(min=0)
    before, after = (
        batch.kind.log_probability(prediction.tables, batch.answers) for prediction in (batch.original, masked)
    )
    found = torch.stack([batch.keeps(masked), divergence, before.exp() - after.exp()], -1)
    return found[batch.asked]
