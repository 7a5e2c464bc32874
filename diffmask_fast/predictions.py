"""What a model predicts, as categorical distributions, and how far two predictions are apart.

Every kind of prediction becomes a tuple of log-probability tables, so that one divergence and one notion of
"the same answer" serve all of them:

* classification: one table (B, C);
* span: two tables (B, T), start and end, over the real tokens;
* binary: one table (B, 2) from one logit per example.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("classification", "span", "binary")
LONGEST_SPAN = 30  # tokens
PADDING = -1e9  # finite, so that 0 * (a - b) of two padded entries is 0 and not NaN

LogProbabilities = tuple[Tensor, ...]


def prediction_kind(output: Any) -> str:
    """The kind of a model's output: "span", "binary" or "classification".

    Raises:
        TypeError: the output has neither `start_logits` and `end_logits`, nor `logits`, nor is a tensor.
    """
    if hasattr(output, "start_logits") and hasattr(output, "end_logits"):
        return "span"
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() > 2:
        raise TypeError(
            f"the model's output ({type(output).__name__}) is no prediction that can be compared: expected "
            "`start_logits` and `end_logits`, `logits` of shape (B, C) or (B,), or such a tensor"
        )
    return "binary" if logits.dim() == 1 or logits.shape[-1] == 1 else "classification"


def log_probabilities(output: Any, kind: str, attention_mask: Tensor | None = None) -> LogProbabilities:
    """The model's output as log-probability tables, float32 at least; padded positions of a span have probability 0.

    Args:
        output: a model output with `logits`, or `start_logits` and `end_logits`, or a tensor of logits.
        kind: one of `KINDS`.
        attention_mask: (B, T), 1 for real tokens; used by "span" only.
    """
    tables = logit_tables(output, kind, attention_mask)
    if kind == "binary":
        logits = tables[0].squeeze(-1)
        return (torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1),)
    return tuple(F.log_softmax(table, dim=-1) for table in tables)


def logit_tables(output: Any, kind: str, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The logits themselves, float32 at least: (B, C), start and end (B, T) with `PADDING` at padded positions of a
    span, or (B, 1) of a binary prediction. Arguments as of `log_probabilities`."""
    if kind == "span":
        tables = [_wide(output.start_logits), _wide(output.end_logits)]
        return tuple(
            tables if attention_mask is None else (t.masked_fill(attention_mask == 0, PADDING) for t in tables)
        )
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    logits = _wide(output if isinstance(output, Tensor) else output.logits)
    return (logits.reshape(-1, 1) if kind == "binary" else logits,)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl_divergence(original: LogProbabilities, masked: LogProbabilities) -> Tensor:
    """KL(original || masked) in nats per example, (B,), summed over the tables (start and end of a span)."""
    tables = [(p.exp() * (p - q)).sum(-1) for p, q in zip(original, masked, strict=True)]
    return torch.stack(tables).sum(0)


def answers(tables: LogProbabilities, allowed: Tensor | None = None) -> Tensor:
    """The prediction of each example: the likeliest class (B, 1), or the likeliest span's start and end (B, 2).

    Args:
        tables: as `log_probabilities` makes them.
        allowed: (B, T) bool, where a span may start and end; None allows every position. A span ends where it
            starts or up to `LONGEST_SPAN - 1` tokens later. Rows that allow nothing allow everything.
    """
    if len(tables) == 1:
        return tables[0].argmax(-1, keepdim=True)
    start, end = tables
    if allowed is not None:
        allowed = allowed | ~allowed.any(-1, keepdim=True)
        start, end = start.masked_fill(~allowed, PADDING), end.masked_fill(~allowed, PADDING)
    # score[b, t, d] of the span t .. t + d, without a (B, T, T) table
    reach = min(LONGEST_SPAN, end.shape[-1])
    ends = F.pad(end, (0, reach - 1), value=PADDING * 2).unfold(-1, reach, 1)
    best = (start.unsqueeze(-1) + ends).flatten(1).argmax(-1)
    return torch.stack([best // reach, best // reach + best % reach], dim=-1)


def scored_answers(
    output: Any, kind: str, tables: LogProbabilities, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`answers`, and what the answer of a text is chosen by among its windows.

    Returns:
        The answers, and of classes their log-probabilities (B, C), of spans the start logit plus the end logit (B, 1).
        The latter are not normalised, as is usual on SQuAD: the probabilities of a window sum to 1 over that window, so
        one that does not hold the answer would look as sure as the one that does.
    """
    found = answers(tables, allowed)
    if kind != "span":
        return found, tables[0]
    starts, ends = _wide(output.start_logits), _wide(output.end_logits)
    return found, starts.gather(1, found[:, :1]) + ends.gather(1, found[:, 1:])
