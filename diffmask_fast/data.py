"""Texts as a model takes them: encoded, unpadded, with the tokens to show and a way to put a prediction in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.predictions import AtPositions, Classes, Kind, Span, kind_for, predicts_words, require_kind

SPECIAL, FIRST, SECOND = 0, 1, 2  # what `segments` holds, see diffmask_fast.attribution.result
LARGEST_STRIDE = 128  # tokens, as is usual on SQuAD


class TooLongError(ValueError):
    """A text has more tokens than the model takes, and cannot be read in windows either."""


@dataclass(frozen=True)
class Window:
    """What one example holds of a text: a piece of the part that was cut, and all that stands before and behind it.

    Attributes:
        text: the number of the text.
        length: how many tokens the whole text has.
        cut: the tokens of the whole text that its windows share out.
        piece: those of them that this window holds; all of them where the text was not cut.
    """

    text: int
    length: int
    cut: range
    piece: range

    @property
    def positions(self) -> list[int]:
        """Where the window's tokens stand in the whole text."""
        return self.take(list(range(self.length)))

    def take(self, row: list) -> list:
        """The window's entries of a row that has one for each token of the whole text."""
        return [*row[: self.cut.start], *row[self.piece.start : self.piece.stop], *row[self.cut.stop :]]


@dataclass(frozen=True)
class Examples:
    """N encoded texts; `examples[i]` is the i-th one's model inputs, so it serves as a data set for a trainer too.

    A text that is longer than the model takes is several examples, one for each of its windows, in their order.

    Attributes:
        inputs: per example, the model's arguments: a list of T numbers where they are per token, else a number or a
            list marked in `fixed`.
        tokens: per example, its T tokens as text.
        segments: per example, for each token 0 (special), 1 (first segment) or 2 (second segment).
        describe: (example index, answer) -> the answer in words; a span is numbered as the example's tokens are.
        pad_values: padding per argument; 0 for what is not named.
        fixed: arguments that are not per token.
        windows: per example, which part of which text it is; None where every example is a whole text.
        kind: of the model's prediction; None where its output tells it.
        mask_token: id of the mask token, where there is one.
    """

    inputs: list[dict[str, Any]]
    tokens: list[list[str]]
    segments: list[list[int]]
    describe: Callable[[int, Sequence[int]], str]
    pad_values: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    windows: list[Window] | None = None
    kind: Kind | None = None
    mask_token: int | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.inputs[i]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def collate(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Examples -> one batch, padded on the right to its longest text, with an `attention_mask` of 1 and 0."""
        batch = [item if "attention_mask" in item else _all_real(item) for item in batch]
        longest = max(len(item["attention_mask"]) for item in batch)
        padded = {}
        for name in batch[0]:
            rows = [item[name] for item in batch]
            if name not in self.fixed:
                pad = self.pad_values.get(name, 0)
                rows = [[*row, *[pad] * (longest - len(row))] for row in rows]
            padded[name] = torch.stack(rows) if isinstance(rows[0], Tensor) else torch.tensor(rows)
        return padded

    def select(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        chosen = list(indices)
        return Examples(
            [self.inputs[i] for i in chosen],
            [self.tokens[i] for i in chosen],
            [self.segments[i] for i in chosen],
            lambda i, answer: self.describe(chosen[i], answer),
            self.pad_values,
            self.fixed,
            None if self.windows is None else [self.windows[i] for i in chosen],
            self.kind,
            self.mask_token,
        )

    def corrupted(self, share: float, seed: int = 0) -> Examples:
        """The same texts with a `share` of their tokens, drawn at random, replaced by the mask token.

        Where there is no mask token, tokens drawn from all the texts take its place. Special tokens stay.
        A text is corrupted in the same way whenever it is read; `tokens` are still the true ones.

        Raises:
            ValueError: a share that is not from 0 to 1; examples that are no texts, or whose model is asked at places
                that their tokens mark.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share!r}; expected a number from 0 to 1")
        texts = "input_ids" in self.inputs[0]
        if not texts or isinstance(self.kind, AtPositions):
            what = "asked at places that their tokens mark" if texts else "no texts"
            raise ValueError(f"these examples can't be corrupted, being {what}: expected a recipe with corrupted=0")
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.tensor(item["input_ids"]) for item in self.inputs]
        free = [torch.tensor(segments) != SPECIAL for segments in self.segments]
        pool = torch.tensor([self.mask_token or 0])
        if self.mask_token is None:
            pool = torch.cat([row[where] for row, where in zip(rows, free, strict=True)])
        inputs = []
        for item, row, where in zip(self.inputs, rows, free, strict=True):
            hit = where & (torch.rand(len(row), generator=generator) < share)
            other = pool[torch.randint(len(pool), row.shape, generator=generator)]
            inputs.append({**item, "input_ids": torch.where(hit, other, row).tolist()})
        return replace(self, inputs=inputs)

    def batches(self, size: int) -> list[list[int]]:
        """Indices in batches of similar length, so that little is padded.

        Raises:
            ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"the batch size is {size}; expected 1 or more")
        order = sorted(range(len(self)), key=self.lengths.__getitem__)
        return [order[i : i + size] for i in range(0, len(order), size)]


def _all_real(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_mask": [1] * len(item["input_ids"]), **item}


def encode(
    tokenizer: Any,
    texts: Sequence[str | tuple[str, str]],
    model: Any,
    stride: int | None = None,
    kind: Kind | None = None,
) -> Examples:
    """Texts, or pairs such as (question, passage), for a Hugging Face model.

    Nothing is dropped for being long. A text with more tokens than the model takes becomes overlapping windows: of a
    pair the second part is cut, and the first one stands in each window. They are the windows that the tokenizer makes
    itself when it is asked to truncate and to return what overflows.

    Args:
        tokenizer: the model's fast tokenizer.
        texts: texts or pairs.
        model: says how many tokens it takes.
        stride: how many tokens of the part that is cut a window shares with the one before it; by default 128, a
            quarter of what the model takes, or half of what there is room for in a window beside the first part of a
            pair, whichever is least.
        kind: what the model predicts, see `diffmask_fast.predictions`. By default what a Hugging Face model was made
            for: classes, spans, numbers (regression) or several labels (by its `problem_type`); classes of all tokens;
            of a causal language model the token that comes next, of a masked one what stands at the mask tokens.

    Raises:
        TypeError: something that is neither a text nor a pair of texts; a stride that is no int; a `kind` that is none.
        ValueError: no text, or an empty one, also where the tokenizer drops all that it holds; a stride below 0;
            a model that does not tell what it predicts; a text without any of the places at which it is asked.
        TooLongError: a prompt of which the next word is asked and that the model does not take whole; a text in whose
            windows there is no room for more than the `stride` tokens that they share, by
            default for a single token, because the first part of the pair takes it.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"texts: expected a list of texts or of pairs, got {type(texts).__name__}: put it in a list")
    if not texts:
        raise ValueError("texts is empty: give at least one")
    for i, text in enumerate(texts):
        parts = (text,) if isinstance(text, str) else text
        pair = isinstance(text, tuple | list) and len(text) == 2
        if not (isinstance(text, str) or pair) or not all(isinstance(part, str) for part in parts):
            raise TypeError(f"text {i}: expected a text or a pair of texts, got {repr(text)[:80]}")
        if not all(part.strip() for part in parts):
            raise ValueError(f"text {i} is empty: leave it out")
    kind = kind_for(model, tokenizer) if kind is None else kind
    require_kind(model, kind)
    limit = length_limit(tokenizer, model)
    if stride is not None and (not isinstance(stride, int) or isinstance(stride, bool)):
        raise TypeError(f"stride: expected a number of tokens, got {stride!r}")
    if stride is not None and stride < 0:
        raise ValueError(f"stride is {stride}; expected 0 or more tokens")

    rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    encodings = [
        tokenizer(*row, return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False) for row in rows
    ]
    whole_segments = [_segments(encoding) for encoding in encodings]
    for i, (row, kinds) in enumerate(zip(rows, whole_segments, strict=True)):
        if not set(kinds) >= set(range(FIRST, FIRST + len(row))):
            raise ValueError(f"text {i} is empty: the tokenizer finds nothing in {repr(texts[i])[:80]}; leave it out")
    windows: list[Window] = []
    for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        try:
            windows += _windows(i, encoding.sequence_ids(), limit, stride)
        except TooLongError as error:
            raise TooLongError(f"text {i}, {repr(text)[:80]}, {error}") from None
    names = [name for name in tokenizer.model_input_names if name in encodings[0]]
    tokens = [tokenizer.convert_ids_to_tokens(encoding["input_ids"]) for encoding in encodings]
    segments = [window.take(whole_segments[window.text]) for window in windows]

    words, label = predicts_words(model), label_names(model)

    def name(number: int) -> str:
        return repr(tokenizer.decode([number])) if words else label(number)

    def describe(i: int, answer: Sequence[int]) -> str:
        if isinstance(kind, Span) or (kind is None and len(answer) == 2):
            text = windows[i].text
            offsets = windows[i].take(encodings[text]["offset_mapping"])
            first, last = (segments[i][token] for token in answer)
            if first != last or first == SPECIAL:
                return "(no span)"
            return rows[text][first - FIRST][offsets[answer[0]][0] : offsets[answer[1]][1]]
        return (kind or Classes()).words(answer, name)

    examples = Examples(
        [{name: window.take(encodings[window.text][name]) for name in names} for window in windows],
        [window.take(tokens[window.text]) for window in windows],
        segments,
        describe,
        {"input_ids": tokenizer.pad_token_id or 0},
        windows=windows if len(windows) > len(texts) else None,
        kind=kind,
        mask_token=tokenizer.mask_token_id,
    )
    if isinstance(kind, AtPositions):
        _require_places(kind, examples, windows)
    return examples


def _require_places(kind: AtPositions, examples: Examples, windows: list[Window]) -> None:
    if kind.where == "last" and examples.windows is not None:
        long = next(window for window in windows if len(window.piece) < len(window.cut))
        raise TooLongError(
            f"text {long.text} has {long.length} tokens, more than the model takes, and what comes next is asked at "
            "its end: give the end of it that the model takes"
        )
    asked = {window.text for i, window in enumerate(windows) if kind.chosen(examples.collate([examples[i]])).any()}
    without = sorted({window.text for window in windows} - asked)
    if without:
        what = f"the token {kind.where}" if isinstance(kind.where, int) else "a place at which the model is asked"
        raise ValueError(f"text {without[0]} has nowhere {what}: put it there, or leave the text out")


def label_names(model: Any) -> Callable[[int], str]:
    """A function that gives the name of a class, by the model's configuration."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    return lambda number: str(labels.get(number, labels.get(str(number), number)))


def _windows(text: int, parts: list[int | None], limit: int, stride: int | None) -> list[Window]:
    """The windows of a text whose tokens belong to `parts`: 0 or 1, or None for special tokens."""
    length, last = len(parts), max(part for part in parts if part is not None)
    # from the first to the last token of the last part: a [SEP] that stands in the text itself belongs to it
    cut = range(parts.index(last), length - parts[::-1].index(last))
    if length <= limit:
        return [Window(text, length, cut, cut)]
    repeated = length - len(cut)
    room = limit - repeated
    if stride is None:  # by half of its room at least a window goes on: there would be hundreds of them otherwise
        stride = min(LARGEST_STRIDE, limit // 4, max(0, room // 2))
    if room <= stride:
        raise TooLongError(
            f"has {length} tokens and the model takes {limit}, and {repeated} of them (special tokens and the first "
            "part of a pair) would stand in every window: no room there for more than the "
            f"{stride} tokens that windows share; shorten the first part"
            + (", or give encode a smaller stride" if stride else "")
        )
    # no window after the one that reaches the end: it would hold nothing but what is shared
    starts = range(cut.start, cut.stop - stride, room - stride)
    return [Window(text, length, cut, range(start, min(start + room, cut.stop))) for start in starts]


def length_limit(tokenizer: Any, model: Any) -> int:
    """How many tokens the model takes at once."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _segments(encoding: Any) -> list[int]:
    return [
        SPECIAL if special or sequence is None else sequence + FIRST
        for special, sequence in zip(encoding["special_tokens_mask"], encoding.sequence_ids(), strict=True)
    ]
