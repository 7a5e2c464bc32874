"""The result of asking a trained probe about texts: for every token and site, P(the gate is not zero).

`Attributions` holds a whole data set of texts of different lengths without padding: what is per token is
stored flat, text after text, in (sum of T_i, ...) tensors. `attributions[i]` is one text. Nothing here is
sampled: the values are expectations, so asking twice gives the same answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from diffmask_fast.attribution import checks
from diffmask_fast.files import replacing

SEGMENT_NAMES = ("special", "question", "passage")
KEPT_ABOVE = 0.5  # the masked prediction is made with exactly the tokens whose P(keep) is above this

_FORMAT = "diffmask_fast.attributions"
_VERSION = 1
_DETAIL = "details."
_TENSORS = ("keep", "segments", "divergence", "kept_prediction")


@dataclass(frozen=True, eq=False)
class Attribution:
    """One text of an `Attributions`, made by indexing it. Tensors are views: nothing is copied.

    Attributes:
        tokens: the T tokens.
        site_names: the S sites, embedding first.
        keep: (T, S) float32, P(z != 0).
        segments: (T,) int8, an index into `SEGMENT_NAMES`.
        divergence: (S,) float32, KL(original || masked) in nats, or what the kind of prediction has in its place.
        original: the prediction on the whole text.
        masked: S predictions, each with the tokens of that site whose `keep` is at most 0.5 replaced.
        kept_prediction: (S,) bool, whether the masked prediction is the original one.
        scores: (T, S) float32, or None where the method gives probabilities.
        details: (S,) float32 each, by name.
        method, masking, meta: as in `Attributions`.
    """

    tokens: list[str]
    site_names: tuple[str, ...]
    keep: Tensor
    segments: Tensor
    divergence: Tensor
    original: str
    masked: list[str]
    kept_prediction: Tensor
    scores: Tensor | None
    details: dict[str, Tensor]
    method: str
    masking: str
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Attributions:
    """What a trained probe says about N texts of T_1 .. T_N tokens at S sites.

    Attributes:
        tokens: N lists of tokens, none empty.
        site_names: the S sites, embedding first, the last layer's output last.
        keep: (sum T_i, S) float32 in [0, 1], P(z != 0): how sure the probe is that the site needs the token.
        segments: (sum T_i,) int8: 0 special ([CLS], [SEP]), 1 first segment (the question, or all of a single
            text), 2 second segment (the passage).
        divergence: (N, S) float32, finite and >= 0: KL(original || masked) in nats, or what the kind of prediction has
            in its place (see `diffmask_fast.predictions`), where the masked prediction is made with every token whose
            P(keep) is at most 0.5 replaced by the baseline.
        original: N predictions on the whole text, as text.
        masked: N lists of S masked predictions.
        kept_prediction: (N, S) bool, whether the masked prediction is the original one.
        method: the attribution method.
        masking: "input" or "hidden".
        meta: what one needs to know to trust or repeat it (model, versions, seed, tolerance); has to be JSON.
        scores: (sum T_i, S) float32, finite, of methods that give scores and not probabilities: `keep` is then the
            size of a score as a share of the largest of its text and site.
        details: (N, S) float32 each, what the method reports about a text beside that, by name.

    All tensors live on the CPU and need no gradient. Of a text that was read in windows, `explain` says how these
    follow from what was found in each.

    Raises:
        TypeError: a field of the wrong type, dtype or device.
        ValueError: shapes that disagree, values out of range, NaN.

    Source: De Cao et al., EMNLP 2020, section 3.1: the expectation of the gates at every layer.
    """

    tokens: list[list[str]]
    site_names: tuple[str, ...]
    keep: Tensor
    segments: Tensor
    divergence: Tensor
    original: list[str]
    masked: list[list[str]]
    kept_prediction: Tensor
    method: str = "diffmask"
    masking: str = "input"
    meta: dict[str, Any] = field(default_factory=dict)
    scores: Tensor | None = None
    details: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "site_names", checks.site_names(self.site_names))
        object.__setattr__(self, "meta", checks.json_meta(self.meta))
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(f"method: expected a name, got {self.method!r}")
        if self.masking not in ("input", "hidden"):
            raise ValueError(f'masking: expected "input" or "hidden", got {self.masking!r}')
        checks.texts(self.tokens, self.original, self.masked, len(self.site_names))
        texts, rows, sites = len(self.tokens), sum(map(len, self.tokens)), len(self.site_names)
        checks.tensor("keep", self.keep, torch.float32, (rows, sites), "(sum of the lengths, sites)")
        checks.tensor("segments", self.segments, torch.int8, (rows,), "(sum of the lengths,)")
        checks.tensor("divergence", self.divergence, torch.float32, (texts, sites), "(texts, sites)")
        checks.tensor("kept_prediction", self.kept_prediction, torch.bool, (texts, sites), "(texts, sites)")
        checks.within("keep", self.keep, 0.0, 1.0, "probabilities P(z != 0): exponentiate log_open")
        checks.within("segments", self.segments, 0, 2, "0 special, 1 first segment, 2 second segment")
        finite_max = torch.finfo(torch.float32).max
        checks.within(
            "divergence",
            self.divergence,
            0.0,
            finite_max,
            "KL in nats, 0 or more: clamp rounding errors, .clamp(min=0)",
        )

        if self.scores is not None:
            checks.tensor("scores", self.scores, torch.float32, (rows, sites), "(sum of the lengths, sites)")
            checks.within("scores", self.scores, -finite_max, finite_max, "finite scores")
        for name, values in self.details.items():
            checks.tensor(f"details[{name!r}]", values, torch.float32, (texts, sites), "(texts, sites)")

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: the number of tokens of each text."""
        return torch.tensor([len(text) for text in self.tokens], dtype=torch.int64)

    @cached_property
    def _ends(self) -> list[int]:
        return self.lengths.cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Attribution]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Attribution: ...
    @overload
    def __getitem__(self, index: slice) -> Attributions: ...
    def __getitem__(self, index: int | slice) -> Attribution | Attributions:
        """One text as an `Attribution`, or a slice of the texts as `Attributions`.

        Raises:
            IndexError: there is no such text.
        """
        if isinstance(index, slice):
            return self._select(range(len(self))[index])
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"expected the number of a text or a slice, got {type(index).__name__}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} does not exist: there are {len(self)} texts")
        i = index % len(self)
        rows = self._rows(i)
        return Attribution(
            tokens=self.tokens[i],
            site_names=self.site_names,
            keep=self.keep[rows],
            segments=self.segments[rows],
            divergence=self.divergence[i],
            original=self.original[i],
            masked=self.masked[i],
            kept_prediction=self.kept_prediction[i],
            scores=None if self.scores is None else self.scores[rows],
            details={name: values[i] for name, values in self.details.items()},
            method=self.method,
            masking=self.masking,
            meta=self.meta,
        )

    def mean_keep(self, segment: int | None = None) -> Tensor:
        """(S,) float32: the share of the tokens that each site needs, on average over texts.

        P(keep) is averaged over the tokens of a text first, then over texts, so that a long text weighs as
        much as a short one. With `segment`, only its tokens count, and texts that have none are left out.

        Raises:
            ValueError: no text has a token of that segment.
        """
        chosen = torch.ones_like(self.segments, dtype=torch.bool) if segment is None else self.segments == segment
        owner = torch.repeat_interleave(torch.arange(len(self)), self.lengths)[chosen]
        counts = torch.bincount(owner, minlength=len(self))
        if not chosen.any():
            what = "there are no texts" if not len(self) else f"no token has segment {segment!r}"
            raise ValueError(f"mean_keep: {what}; the segments here are {self.segments.unique().tolist()}")
        # float64: a float32 running sum over millions of tokens would lose digits
        sums = torch.zeros(len(self), len(self.site_names), dtype=torch.float64)
        sums.index_add_(0, owner, self.keep[chosen].double())
        some = counts > 0
        return (sums[some] / counts[some, None]).mean(0).float()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python that `json.dumps` takes; one entry per text under "texts"."""
        return {
            **self._description(),
            "texts": [
                {
                    "tokens": list(text.tokens),
                    "segments": text.segments.tolist(),
                    "keep": text.keep.tolist(),
                    "divergence": text.divergence.tolist(),
                    "original": text.original,
                    "masked": list(text.masked),
                    "kept_prediction": text.kept_prediction.tolist(),
                    **({} if text.scores is None else {"scores": text.scores.tolist()}),
                    **{name: values.tolist() for name, values in text.details.items()},
                }
                for text in self
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the description as JSON in its metadata, values and texts as tensors.

        The texts are a tensor of bytes (JSON too): safetensors limits the metadata to 100 MB. The file
        is written beside `path` and moved there, so a crash leaves the old file whole.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
        """
        from safetensors.torch import save_file

        texts = json.dumps({"tokens": self.tokens, "original": self.original, "masked": self.masked}).encode()
        tensors = {name: getattr(self, name).contiguous().clone() for name in _TENSORS}
        if self.scores is not None:
            tensors["scores"] = self.scores.contiguous().clone()
        tensors |= {_DETAIL + name: values.contiguous().clone() for name, values in self.details.items()}
        tensors["texts"] = torch.frombuffer(bytearray(texts), dtype=torch.uint8)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"diffmask_fast": json.dumps(self._description())})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attributions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not ours, is cut short or damaged, or has an unknown format version.
        """
        tensors, description = _read(path)
        if description["version"] != _VERSION:
            raise ValueError(
                f"{path} has format version {description['version']!r}, this diffmask_fast reads version "
                f"{_VERSION}; load it with the diffmask_fast that wrote it, or write it again"
            )
        try:
            raw = bytearray(tensors["texts"].numel())
            torch.frombuffer(raw, dtype=torch.uint8).copy_(tensors["texts"])
            fields: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
            fields["scores"] = tensors.get("scores")
            fields["details"] = {name[len(_DETAIL) :]: tensors[name] for name in tensors if name.startswith(_DETAIL)}
            fields |= {name: description[name] for name in ("site_names", "method", "masking", "meta")}
            return cls(**json.loads(raw), **fields)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}; write it again") from error

    def _description(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method,
            "masking": self.masking,
            "site_names": list(self.site_names),
            "meta": self.meta,
        }

    def _rows(self, i: int) -> slice:
        return slice(self._ends[i] - len(self.tokens[i]), self._ends[i])

    def _select(self, chosen: range) -> Attributions:
        index = torch.tensor(list(chosen), dtype=torch.int64)
        rows = [self._rows(i) for i in chosen]
        return Attributions(
            tokens=[self.tokens[i] for i in chosen],
            site_names=self.site_names,
            keep=torch.cat([self.keep[:0], *(self.keep[r] for r in rows)]),
            segments=torch.cat([self.segments[:0], *(self.segments[r] for r in rows)]),
            divergence=self.divergence[index],
            original=[self.original[i] for i in chosen],
            masked=[self.masked[i] for i in chosen],
            kept_prediction=self.kept_prediction[index],
            scores=None if self.scores is None else torch.cat([self.scores[:0], *(self.scores[r] for r in rows)]),
            details={name: values[index] for name, values in self.details.items()},
            method=self.method,
            masking=self.masking,
            meta=self.meta,
        )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("diffmask_fast", "{}")
            # cloned, so that no tensor is left pointing into a file that may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        description = json.loads(text)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not an attributions file, or it is cut short ({error})") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT or "version" not in description:
        raise ValueError(f"{path} is a safetensors file, but not one that Attributions.save wrote")
    return tensors, description
