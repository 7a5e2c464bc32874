"""Some texts in a patched model, with the original prediction: what every attribution method starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.data import SECOND, SPECIAL, Examples
from diffmask_fast.predictions import Kind, Tables, kind_of
from diffmask_fast.sites import Patched


class Prediction(NamedTuple):
    """A model's output, and what its kind reads in it."""

    output: Any
    tables: Tables


@dataclass(frozen=True, eq=False)
class Batch:
    """B texts, padded to T tokens, in a patched model.

    Attributes:
        patched: the handle of the frozen model.
        inputs: the model's arguments, `attention_mask` (B, T) among them.
        states: the states (B, T, H) at the sites that were asked for.
        original: what the model says about the whole texts.
        kind: of that prediction.
        allowed: (B, T) bool, where a predicted span has to lie.
        special: (B, T) bool, where the tokenizer's own tokens stand, such as [CLS] and [SEP].
        fixed: the inputs that are not per token.
    """

    patched: Patched
    inputs: dict[str, Tensor]
    states: dict[int, Tensor]
    original: Prediction
    kind: Kind
    allowed: Tensor
    special: Tensor
    fixed: frozenset[str] = frozenset()

    @property
    def real(self) -> Tensor:
        """(B, T), 1 for tokens and 0 for padding."""
        return self.inputs["attention_mask"]

    def __len__(self) -> int:
        return len(self.real)

    def predict(self, site: int, state: Tensor, rows: Tensor | None = None) -> Prediction:
        """What the model says when the state at `site` is another one; the layers below don't run.

        Args:
            site: where.
            state: (B, T, H), or (R, L, H) with `rows`.
            rows: (R,) int64, the text of each row: a text may have several, or none. With texts of up to L tokens
                only, their padding is cut off there: the tables of a span are (R, L).
        """
        inputs = self.inputs
        if rows is not None:
            cut = {name: value[rows] for name, value in inputs.items()}
            inputs = {name: v if name in self.fixed else v[:, : state.shape[1]] for name, v in cut.items()}
        output = self.patched.run(inputs, resume=(site, state)).output
        return Prediction(output, self.kind.tables(output, inputs))

    def divergence(self, prediction: Prediction, rows: Tensor | None = None) -> Tensor:
        """(B,) or (R,) in nats: how far the prediction is from the original one, KL(original || prediction)."""
        original = self.original.tables
        if rows is not None:
            original = tuple(p[rows, : q.shape[1]] for p, q in zip(original, prediction.tables, strict=True))
        return self.kind.divergence(original, prediction.tables)

    @cached_property
    def answers(self) -> Tensor:
        """(B, A) what the model says about the whole texts."""
        return self.kind.answers(self.original.tables, self.allowed)

    @cached_property
    def asked(self) -> Tensor:
        """(B,) bool, see `Kind.asked`."""
        return self.kind.asked(self.original.tables)

    def keeps(self, prediction: Prediction, rows: Tensor | None = None) -> Tensor:
        """(B,) or (R,) bool: whether it is the original prediction still."""
        if rows is None:
            return self.kind.same(self.kind.answers(prediction.tables, self.allowed), self.answers)
        allowed = self.allowed[rows, : prediction.tables[0].shape[1]]  # (R, L) for spans, and no other kind looks at it
        found = self.kind.answers(prediction.tables, allowed)
        return self.kind.same(found, self.answers[rows, : found.shape[1]])

    def mixed(self, site: int, gates: Tensor, baseline: Tensor, rows: Tensor | None = None) -> Tensor:
        """The state at `site` where `gates` (B, T) or (R, L) are 1, the `baseline` (H,) where they are 0."""
        state = self.states[site] if rows is None else self.states[site][rows, : gates.shape[1]]
        gates = gates.unsqueeze(-1).to(state.dtype)
        return gates * state + (1 - gates) * baseline.to(state.dtype)


def read_batch(
    patched: Patched, examples: Examples, numbers: list[int], sites: Iterable[int], device: torch.device
) -> Batch:
    """The examples with these numbers, their states at `sites` and their original prediction.

    Raises:
        ValueError: states or a prediction that hold NaN or infinity.
    """
    collated = examples.collate([examples[i] for i in numbers])
    inputs = {name: value.to(device) for name, value in collated.items()}
    output, states = patched.run(inputs, capture=sites)
    for site, state in states.items():
        check_finite(state, f"the model's state at site {site} ({patched.sites[site].name})")
    kind = examples.kind or kind_of(output)
    tables = kind.tables(output, inputs)
    for table in tables:
        check_finite(table, "the model's prediction")
    segments = [torch.tensor(examples.segments[i]) for i in numbers]
    allowed, special = (
        torch.nn.utils.rnn.pad_sequence([row == segment for row in segments], batch_first=True).to(device)
        for segment in (SECOND, SPECIAL)
    )
    return Batch(patched, inputs, states, Prediction(output, tables), kind, allowed, special, examples.fixed)


class Masked(NamedTuple):
    """What a method found at one site, and where and by what a dropped state is replaced.

    Attributes:
        target: the site whose state is replaced.
        baseline: (H,), what replaces it.
        keep: (B, T) in [0, 1].
        scores: (B, T), for methods that give no probabilities: what `keep` was made from.
        details: (B,) for each thing that the method reports about a text.
    """

    target: int
    baseline: Tensor
    keep: Tensor
    scores: Tensor | None = None
    details: Mapping[str, Tensor] = MappingProxyType({})


def say(batch: Batch, lengths: list[int], masked: Iterable[Masked]) -> list[dict[str, Any]]:
    """What there is to say about each text: at the S sites of `masked` its `keep` (T, S), `scores` (T, S) or None,
    `details` (S,) each, and `divergence` (S,) of the prediction made with the tokens kept above `KEPT_ABOVE`; and of
    the original and the S masked predictions, by their `kind`, the `answers` (1 + S, A) and their `answer_scores`
    (1 + S, ...)."""

    def answered(prediction: Prediction) -> tuple[Tensor, Tensor]:
        found = batch.kind.answers(prediction.tables, batch.allowed)
        return found, batch.kind.scores(prediction.output, prediction.tables, found)

    said = [answered(batch.original)]
    sites, divergences = [], []
    for one in masked:
        gates = (one.keep > KEPT_ABOVE).float()
        prediction = batch.original
        dropped = gates < batch.real
        if dropped.any():  # as at few of the lower sites of most models
            prediction = batch.predict(one.target, batch.mixed(one.target, gates, one.baseline))
        for table in prediction.tables:
            check_finite(table, f"the masked prediction of site {one.target} ({batch.patched.sites[one.target].name})")
        divergences.append(batch.divergence(prediction).clamp(min=0))
        said.append(answered(prediction))
        sites.append(one)
    keep, divergence = stacked([one.keep for one in sites]), stacked(divergences)
    scores = [one.scores for one in sites if one.scores is not None]
    given = stacked(scores) if scores else None
    details = {name: stacked([one.details[name] for one in sites]) for name in sites[0].details}
    found, answer_scores = (torch.stack(parts, 1).cpu() for parts in zip(*said, strict=True))
    return [
        {
            "keep": keep[row, :length],
            "scores": None if given is None else given[row, :length],
            "details": {name: values[row] for name, values in details.items()},
            "divergence": divergence[row],
            "kind": batch.kind,
            "asked": batch.asked[row].item(),
            "answers": found[row],
            "answer_scores": answer_scores[row],
        }
        for row, length in enumerate(lengths)
    ]


def stacked(sites: list[Tensor]) -> Tensor:
    """One tensor per site -> (..., S) float32 on the CPU."""
    return torch.stack([site.detach() for site in sites], -1).float().cpu()


def check_finite(value: Tensor, what: str) -> None:
    """One clear error for NaN and infinities."""
    if not torch.isfinite(value).all():
        raise ValueError(
            f"{what} holds NaN or infinity: the model's weights or inputs are broken, nothing can be explained"
        )
