"""What a model predicts, and how far two predictions are apart.

A `Kind` of prediction reads a model's output as a tuple of tables, one row per example, so that training, remembering,
explaining and every method do the same with all of them:

| kind | of | tables | divergence in nats |
|---|---|---|---|
| `Classes` | one class of C | log-probabilities (B, C) | KL |
| `Binary` | yes or no, from one logit | log-probabilities (B, 2) | KL |
| `Span` | a span of the text | log-probabilities (B, T), of its start and of its end | sum of both KLs |
| `Labels` | any of C labels | C times log-probabilities (B, 2) | sum of all KLs |
| `Values` | R numbers | the numbers (B, R), in units of `scale` | half the squared distance |
| `AtPositions` | a class or a word at P places of the text | log-probabilities (B, P, C) | mean KL over the places |
| `Own` | what a function reads | what it gives | what another function says |
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST_SPAN = 30  # tokens
PADDING = -1e9  # finite, so that 0 * (a - b) of two padded entries is 0 and not NaN

Tables = tuple[Tensor, ...]
Inputs = Mapping[str, Tensor]


class Kind(ABC):
    """What all kinds of prediction have in common; each is a way to read a model's output.

    `inputs` are the model's arguments, `attention_mask` (B, T) among them, 1 for real tokens.
    """

    @abstractmethod
    def logits(self, output: Any, inputs: Inputs) -> Tables:
        """What the tables are made from, float32 at least, `PADDING` where there is nothing.

        Raises:
            TypeError: an output of another kind.
        """

    @abstractmethod
    def tables(self, output: Any, inputs: Inputs) -> Tables:
        """The prediction, float32 at least. Raises as `logits`."""

    def divergence(self, original: Tables, masked: Tables) -> Tensor:
        """(B,) in nats, KL(original || masked) unless the kind says otherwise."""
        return torch.stack([_kl(p, q) for p, q in zip(original, masked, strict=True)]).sum(0)

    def answers(self, tables: Tables, allowed: Tensor | None = None) -> Tensor:
        """(B, A) what is predicted: by default the likeliest entry of each table.

        Args:
            tables: as the method `tables` makes them.
            allowed: (B, T) bool, where a span may start and end; None allows every position.
        """
        return torch.stack([table.argmax(-1) for table in tables], -1)

    def asked(self, tables: Tables) -> Tensor:
        """(B,) bool: whether there is a prediction at all. A window of a text may have no place to be asked about."""
        return torch.ones(len(tables[0]), dtype=torch.bool, device=tables[0].device)

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        """Answers (..., A) and (..., A) -> (...,) bool: whether it is the same prediction."""
        return (one == other).all(-1)

    def log_probability(self, tables: Tables, answers: Tensor) -> Tensor:
        """(B,) the log-probability of these answers (B, A)."""
        picked = (table.gather(1, answers[:, i : i + 1]).squeeze(1) for i, table in enumerate(tables))
        return sum(picked, start=torch.zeros_like(tables[0][:, 0]))

    def scores(self, output: Any, tables: Tables, answers: Tensor) -> Tensor:
        """(B, ...) what the answer of a text that was read in windows is found by, see `of_windows`."""
        return torch.stack(tables, 1)

    def of_windows(self, scores: Tensor) -> Tensor:
        """The answers (..., A) of a text, from the scores (windows, ...): the likeliest by mean probability."""
        # the log of the sum is, of one window, that window's own log-probability, exactly
        return scores.logsumexp(0).argmax(-1)

    def words(self, answer: Sequence[float], name: Callable[[int], str]) -> str:
        """An answer in words; `name` gives that of a class."""
        return " ".join(name(int(one)) for one in answer)

    def row_sizes(self, tables: Tables, inputs: Inputs) -> tuple[int, ...] | None:
        """How many numbers the tables of the one example in `inputs` hold; None if nobody knows without the model.

        Args:
            tables: of any one example.
            inputs: of the example asked about.
        """
        return tuple(table[0].numel() for table in tables)


@dataclass(frozen=True)
class Classes(Kind):
    """One class of C: logits (B, C)."""

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        return (_logits(output, 2, "(B, C)"),)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return tuple(F.log_softmax(table, dim=-1) for table in self.logits(output, inputs))


@dataclass(frozen=True)
class Binary(Kind):
    """Yes or no: one logit per example, (B,) or (B, 1)."""

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        return (_logits(output, 1, "(B,) or (B, 1)"),)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return (_two_classes(self.logits(output, inputs)[0].squeeze(-1)),)


@dataclass(frozen=True)
class Span(Kind):
    """A span: `start_logits` and `end_logits` (B, T). Padded positions have probability 0."""

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        if not (hasattr(output, "start_logits") and hasattr(output, "end_logits")):
            raise _wrong(output, "`start_logits` and `end_logits`")
        padded = inputs["attention_mask"] == 0
        return tuple(_wide(side).masked_fill(padded, PADDING) for side in (output.start_logits, output.end_logits))

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return tuple(F.log_softmax(table, dim=-1) for table in self.logits(output, inputs))

    def answers(self, tables: Tables, allowed: Tensor | None = None) -> Tensor:
        """(B, 2) the likeliest span's start and end. It ends where it starts or up to `LONGEST_SPAN - 1` tokens
        later. Rows that allow nothing allow everything."""
        start, end = tables
        if allowed is not None:
            allowed = allowed | ~allowed.any(-1, keepdim=True)
            start, end = start.masked_fill(~allowed, PADDING), end.masked_fill(~allowed, PADDING)
        # score[b, t, d] of the span t .. t + d, without a (B, T, T) table
        reach = min(LONGEST_SPAN, end.shape[-1])
        ends = F.pad(end, (0, reach - 1), value=PADDING * 2).unfold(-1, reach, 1)
        best = (start.unsqueeze(-1) + ends).flatten(1).argmax(-1)
        return torch.stack([best // reach, best // reach + best % reach], dim=-1)

    def scores(self, output: Any, tables: Tables, answers: Tensor) -> Tensor:
        """(B, 1) the start logit plus the end logit. They are not normalised, as is usual on SQuAD: the probabilities
        of a window sum to 1 over that window, so one that does not hold the answer would look as sure as the one that
        does."""
        starts, ends = _wide(output.start_logits), _wide(output.end_logits)
        return starts.gather(1, answers[:, :1]) + ends.gather(1, answers[:, 1:])

    def row_sizes(self, tables: Tables, inputs: Inputs) -> tuple[int, ...]:
        return (inputs["attention_mask"].shape[1],) * len(tables)


@dataclass(frozen=True)
class Labels(Kind):
    """Any of C labels, each for itself: logits (B, C)."""

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        return _logits(output, 2, "(B, C)").split(1, dim=1)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return tuple(_two_classes(label.squeeze(1)) for label in self.logits(output, inputs))

    def words(self, answer: Sequence[float], name: Callable[[int], str]) -> str:
        there = [name(i) for i, one in enumerate(answer) if one]
        return ", ".join(there) or "(none)"


@dataclass(frozen=True)
class Values(Kind):
    """R numbers, as regression predicts: logits (B, R), or (B,).

    Two predictions are taken as normal distributions around the numbers with the standard deviation `scale`: their
    KL is half the squared distance in these units. The prediction stays while no number moves by more than `scale`.

    Attributes:
        scale: in the numbers' own unit, the difference that begins to matter.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale is {self.scale!r}; expected a finite number above 0")

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        found = _tensor(output)
        return (_logits(output, 2, "(B, R)") if found is not None and found.dim() == 2 else _logits(output, 1, "(B,)"),)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return tuple(table / self.scale for table in self.logits(output, inputs))

    def divergence(self, original: Tables, masked: Tables) -> Tensor:
        """(B,) half the squared distance, in units of `scale`."""
        return (original[0] - masked[0]).square().sum(-1) / 2

    def answers(self, tables: Tables, allowed: Tensor | None = None) -> Tensor:
        """(B, R) the numbers."""
        return tables[0] * self.scale

    def same(self, one: Tensor, other: Tensor) -> Tensor:
        return ((one - other).abs() <= self.scale).all(-1)

    def log_probability(self, tables: Tables, answers: Tensor) -> Tensor:
        """(B,) of the normal distribution, but for a constant."""
        return -(tables[0] - answers / self.scale).square().sum(-1) / 2

    def of_windows(self, scores: Tensor) -> Tensor:
        """The mean over the windows."""
        return scores.mean(0).squeeze(-2) * self.scale

    def words(self, answer: Sequence[float], name: Callable[[int], str]) -> str:
        return _numbers(answer)


@dataclass(frozen=True)
class AtPositions(Kind):
    """A class or a word at some places of the text: logits (B, T, C), of which only those places are looked at.

    Attributes:
        where: "every" real token (token classification); the "last" one, at which a causal language model says what
            comes next (after the end mark, if the tokenizer adds one); the id of a token, such as the mask token of a
            masked language model; or a function from the model's arguments, which are padded on the right, to (B, T)
            bool.
    """

    where: str | int | Callable[[Inputs], Tensor] = "every"

    def __post_init__(self) -> None:
        if callable(self.where) or self.where in ("every", "last"):
            return
        if isinstance(self.where, str | bool) or not hasattr(self.where, "__index__"):
            raise ValueError(f'where is {self.where!r}; expected "every", "last", the id of a token, or a function')
        object.__setattr__(self, "where", operator.index(self.where))

    def chosen(self, inputs: Inputs) -> Tensor:
        """(B, T) bool, the places."""
        real = inputs["attention_mask"] != 0
        if callable(self.where):
            return self.where(inputs).bool() & real
        if isinstance(self.where, int):
            return (inputs["input_ids"] == self.where) & real
        return real if self.where == "every" else real & (real.flip(1).cumsum(1).flip(1) == 1)

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        logits = _tensor(output)
        places = self.chosen(inputs)
        if logits is None or logits.dim() != 3 or logits.shape[:2] != places.shape:
            raise _wrong(output, f"`logits` of shape (B, T, C) with (B, T) = {tuple(places.shape)}")
        # first the places, in their order: a language model's whole (B, T, C) is never turned into probabilities
        first = places.int().argsort(dim=1, descending=True, stable=True)[:, : int(places.sum(1).max())]
        picked = _wide(logits.gather(1, first.unsqueeze(-1).expand(-1, -1, logits.shape[-1])))
        picked = picked.clamp(min=PADDING)  # some models rule words out by -inf
        return (picked.masked_fill(~places.gather(1, first).unsqueeze(-1), PADDING),)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        (logits,) = self.logits(output, inputs)
        return (F.log_softmax(logits, dim=-1).masked_fill(~_there(logits).unsqueeze(-1), PADDING),)

    def divergence(self, original: Tables, masked: Tables) -> Tensor:
        """(B,) KL(original || masked), the mean over the places; 0 of a text that has none."""
        (p,), (q,) = original, masked
        return _kl(p, q).sum(-1) / _there(p).sum(-1).clamp(min=1)

    def asked(self, tables: Tables) -> Tensor:
        return _there(tables[0]).any(-1)

    def answers(self, tables: Tables, allowed: Tensor | None = None) -> Tensor:
        """(B, P) the likeliest class at each place, -1 behind the last one."""
        return tables[0].argmax(-1).masked_fill(~_there(tables[0]), -1)

    def log_probability(self, tables: Tables, answers: Tensor) -> Tensor:
        """(B,) the mean over the places."""
        picked = tables[0].gather(-1, answers.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked.masked_fill(answers < 0, 0).sum(-1) / (answers >= 0).sum(-1).clamp(min=1)

    def scores(self, output: Any, tables: Tables, answers: Tensor) -> Tensor:
        """(B, 0) nothing: each place has its answer from one window."""
        return tables[0][:, :0, 0]

    def row_sizes(self, tables: Tables, inputs: Inputs) -> tuple[int, ...] | None:
        if callable(self.where):  # another function may have the same name
            return None
        return (int(self.chosen(inputs).sum()) * tables[0].shape[-1],)


@dataclass(frozen=True)
class Own(Kind):
    """A prediction that functions of yours read and compare. Its originals are not remembered between epochs.

    Attributes:
        distance: (original, masked), both as `read` gives them -> (B,), at least 0 and with a gradient for `masked`.
        read: (the model's output, its arguments) -> a tensor (B,) or (B, ...), the same whatever a text is padded with;
            by default the `logits` (B, C).
        answer: what `read` gives -> (B, A), alike as long as the prediction stays; by default the largest of C.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[Any, Inputs], Tensor] | None = None
    answer: Callable[[Tensor], Tensor] | None = None

    def logits(self, output: Any, inputs: Inputs) -> Tables:
        if self.read is None:
            return (_logits(output, 2, "(B, C), or Own(..., read=...)"),)
        found = self.read(output, inputs)
        size = len(inputs["attention_mask"])
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != size:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise _wrong(output, f"a tensor ({size},) or ({size}, ...) from `read`, got {got}")
        return (_wide(found).reshape(size, -1) if found.dim() == 1 else _wide(found),)

    def tables(self, output: Any, inputs: Inputs) -> Tables:
        return self.logits(output, inputs)

    def divergence(self, original: Tables, masked: Tables) -> Tensor:
        found = self.distance(original[0], masked[0])
        if not isinstance(found, Tensor) or found.shape != masked[0].shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"distance gave {got}; expected one number per example, ({len(masked[0])},)")
        return found

    def answers(self, tables: Tables, allowed: Tensor | None = None) -> Tensor:
        if self.answer is None and tables[0].shape[1:] == (1,):
            raise ValueError("one number has no largest entry: say by Own(..., answer=...) when the prediction stays")
        found = tables[0].argmax(-1) if self.answer is None else self.answer(tables[0])
        return found.reshape(len(found), -1)

    def log_probability(self, tables: Tables, answers: Tensor) -> Tensor:
        raise ValueError(
            "an own kind of prediction gives its answers no probability, which integrated gradients, leaving one out "
            "and faithfulness ask for: choose another method"
        )

    def words(self, answer: Sequence[float], name: Callable[[int], str]) -> str:
        """The numbers: nobody knows what they stand for."""
        return _numbers(answer)

    def scores(self, output: Any, tables: Tables, answers: Tensor) -> Tensor:
        """(B, 0) nothing: the answers of all windows count, one behind the other."""
        return answers[:, :0].float()

    def row_sizes(self, tables: Tables, inputs: Inputs) -> None:
        return None


def _numbers(answer: Sequence[float]) -> str:
    return ", ".join(f"{one + 0.0:.4g}" for one in answer)  # no "-0"


def require_kind(model: Any, kind: Kind | None) -> None:
    """Refuse, where no kind was given, a model whose output would be taken for another kind of prediction.

    Raises:
        TypeError: what was given is no kind.
        ValueError: as said.
    """
    if kind is not None and not isinstance(kind, Kind):
        raise TypeError(f"kind: expected one of diffmask_fast.predictions, such as Classes(), got {kind!r}")
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if kind is None and problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the model's problem_type is {problem!r}, which its output does not tell: give Examples that are made by "
            "hand a kind, Values() or Labels()"
        )


def kind_of(output: Any) -> Kind:
    """The kind of prediction that an output tells by itself: a span, a class, or yes or no.

    Raises:
        TypeError: the output has neither `start_logits` and `end_logits`, nor `logits` of one or two dimensions, nor is
            such a tensor.
    """
    if hasattr(output, "start_logits") and hasattr(output, "end_logits"):
        return Span()
    logits = _tensor(output)
    if logits is None or logits.dim() not in (1, 2):
        raise _wrong(
            output, "`start_logits` and `end_logits`, `logits` of shape (B, C) or (B,), or texts encoded with a `kind`"
        )
    return Binary() if logits.dim() == 1 or logits.shape[-1] == 1 else Classes()


def kind_for(model: Any, tokenizer: Any = None) -> Kind | None:
    """The kind of prediction that a Hugging Face model was made for, where its output does not tell it; else None.

    Raises:
        ValueError: a model whose class and configuration leave it open.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return Values()
    if problem == "multi_label_classification":
        return Labels()
    if _is_one(model, "TOKEN_CLASSIFICATION"):
        return AtPositions("every")
    causal, masked = _is_one(model, "CAUSAL_LM"), _is_one(model, "MASKED_LM")
    if causal and masked:
        raise ValueError(
            f"{name} may be a causal or a masked language model: encode the texts with kind=AtPositions("
            '"last") or AtPositions(tokenizer.mask_token_id)'
        )
    if causal:
        return AtPositions("last")
    if masked:
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise ValueError(
                f"{name} predicts words at places of the text, and its tokenizer has no mask token that would show "
                "them: encode the texts with kind=AtPositions(where)"
            )
        return AtPositions(mask)
    classifies = _is_one(model, "SEQUENCE_CLASSIFICATION") or _is_one(model, "IMAGE_CLASSIFICATION")
    if classifies and getattr(config, "num_labels", None) == 1 and problem is None:
        raise ValueError(
            f"{name} has one output and no problem_type: it may be a number or a yes or no. Set model.config."
            'problem_type to "regression", or encode the texts with kind=Binary() or kind=Values()'
        )
    return None


def predicts_words(model: Any) -> bool:
    """Whether the classes of a Hugging Face model are the tokens of its tokenizer."""
    return _is_one(model, "CAUSAL_LM") or _is_one(model, "MASKED_LM")


def _is_one(model: Any, task: str) -> bool:
    """Whether transformers lists the model's class under a task."""
    if getattr(model, "config", None) is None:
        return False
    from transformers.models.auto import modeling_auto

    listed = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    names = {one for entry in listed for one in ([entry] if isinstance(entry, str) else entry)}
    return any(cls.__name__ in names for cls in type(model).__mro__)


def _tensor(output: Any) -> Tensor | None:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def _logits(output: Any, dimensions: int, shape: str) -> Tensor:
    """The logits as a matrix; with one dimension asked for, also a column will do."""
    found = _tensor(output)
    one = dimensions == 1 and found is not None and found.dim() == 2 and found.shape[1] == 1
    if found is None or not (one or found.dim() == dimensions):
        raise _wrong(output, f"`logits` of shape {shape}")
    return _wide(found).reshape(len(found), -1)


def _wrong(output: Any, expected: str) -> TypeError:
    found = _tensor(output)
    got = type(output).__name__ + ("" if found is None else f" of shape {tuple(found.shape)}")
    return TypeError(f"the model's output ({got}) is no prediction that can be compared: expected {expected}")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _two_classes(logits: Tensor) -> Tensor:
    return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of the distributions in the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def _there(table: Tensor) -> Tensor:
    """(B, P) bool: which rows of a table (B, P, C) are no padding."""
    return table.amax(-1) > PADDING / 2
