"""Texts as a model takes them: encoded, unpadded, with the tokens to show and a way to put a prediction in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SPECIAL, FIRST, SECOND = 0, 1, 2  # what `segments` holds, see diffmask_fast.attribution.result


class TooLongError(ValueError):
    """A text has more tokens than the model takes."""


@dataclass(frozen=True)
class Examples:
    """N encoded texts; `examples[i]` is the i-th one's model inputs, so it serves as a data set for a trainer too.

    Attributes:
        inputs: per example, the model's arguments: a list of T numbers where they are per token, else a number or a
            list marked in `fixed`.
        tokens: per example, its T tokens as text.
        segments: per example, for each token 0 (special), 1 (first segment) or 2 (second segment).
        describe: (example index, answer) -> the answer in words.
        pad_values: padding per argument; 0 for what is not named.
        fixed: arguments that are not per token.
    """

    inputs: list[dict[str, Any]]
    tokens: list[list[str]]
    segments: list[list[int]]
    describe: Callable[[int, Sequence[int]], str]
    pad_values: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.inputs[i]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def collate(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Examples -> one batch, padded on the right to its longest text, with an `attention_mask` of 1 and 0."""
        batch = [{"attention_mask": [1] * len(item["input_ids"]), **item} for item in batch]
        longest = max(len(item["input_ids"]) for item in batch)
        padded = {}
        for name in batch[0]:
            rows = [item[name] for item in batch]
            if name not in self.fixed:
                pad = self.pad_values.get(name, 0)
                rows = [[*row, *[pad] * (longest - len(row))] for row in rows]
            padded[name] = torch.tensor(rows)
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
        )

    def batches(self, size: int) -> list[list[int]]:
        """Indices in batches of similar length, so that little is padded.

        Raises:
            ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"the batch size is {size}; expected 1 or more")
        order = sorted(range(len(self)), key=self.lengths.__getitem__)
        return [order[i : i + size] for i in range(0, len(order), size)]


def encode(tokenizer: Any, texts: Sequence[str | tuple[str, str]], model: Any) -> Examples:
    """Texts, or pairs such as (question, passage), for a Hugging Face model.

    Raises:
        TypeError: something that is neither a text nor a pair of texts.
        ValueError: no text, or an empty one, also where the tokenizer drops all that it holds.
        TooLongError: a text that has more tokens than the model takes; nothing is cut silently.
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
    rows = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    encodings = [
        tokenizer(*row, return_special_tokens_mask=True, return_offsets_mapping=True, verbose=False) for row in rows
    ]
    limit = length_limit(tokenizer, model)
    for i, encoding in enumerate(encodings):
        if len(encoding["input_ids"]) > limit:
            raise TooLongError(
                f"text {i} has {len(encoding['input_ids'])} tokens and the model takes {limit}: shorten or split it "
                "(nothing is cut silently, and longer texts are not windowed in this version)"
            )
    names = [name for name in tokenizer.model_input_names if name in encodings[0]]
    ids = [encoding["input_ids"] for encoding in encodings]
    segments = [_segments(encoding) for encoding in encodings]

    for i, (row, kinds) in enumerate(zip(rows, segments, strict=True)):
        if not set(kinds) >= set(range(FIRST, FIRST + len(row))):
            raise ValueError(f"text {i} is empty: the tokenizer finds nothing in {repr(texts[i])[:80]}; leave it out")

    def describe(i: int, answer: Sequence[int]) -> str:
        if len(answer) == 2:
            offsets = encodings[i]["offset_mapping"]
            first, last = (segments[i][token] for token in answer)
            if first != last or first == SPECIAL:
                return "(no span)"
            return rows[i][first - FIRST][offsets[answer[0]][0] : offsets[answer[1]][1]]
        return str((getattr(model.config, "id2label", None) or {}).get(answer[0], answer[0]))

    return Examples(
        [{name: encoding[name] for name in names} for encoding in encodings],
        [tokenizer.convert_ids_to_tokens(row) for row in ids],
        segments,
        describe,
        {"input_ids": tokenizer.pad_token_id or 0},
    )


def length_limit(tokenizer: Any, model: Any) -> int:
    """How many tokens the model takes at once."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _segments(encoding: Any) -> list[int]:
    return [
        SPECIAL if special or sequence is None else sequence + FIRST
        for special, sequence in zip(encoding["special_tokens_mask"], encoding.sequence_ids(), strict=True)
    ]
