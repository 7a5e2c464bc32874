"""Ask a trained probe about texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast import processes
from diffmask_fast.attribution.result import KEPT_ABOVE, Attributions
from diffmask_fast.attribution.windows import merge, whole_texts
from diffmask_fast.data import SECOND, Examples, encode
from diffmask_fast.masking import frozen, keep_probabilities, masked_run
from diffmask_fast.predictions import kl_divergence, log_probabilities, prediction_kind, scored_answers
from diffmask_fast.probes import Probe
from diffmask_fast.progress import progress
from diffmask_fast.sites import Patched, patch


@torch.no_grad()
def explain(
    model: nn.Module,
    probe: Probe,
    texts: Examples | Sequence[str | tuple[str, str]],
    tokenizer: Any = None,
    *,
    batch_size: int = 16,
    meta: dict[str, Any] | None = None,
    show_progress: bool = False,
    shared: bool = False,
) -> Attributions:
    """At which site does the model know that it can do without a token?

    A text that is longer than the model takes is read in overlapping windows, see `encode`. Each is explained by
    itself, and the text has one entry in the result:

    * P(keep) of a token of the part that was cut is that of the window in which the token has the most of that part on
      its scarcer side (of two alike, the earlier). Of a token that stands in every window ([CLS], the question, [SEP])
      it is the largest: needed in one window is needed.
    * A predicted span is the one of the window that gives its best span the highest start logit plus end logit, for
      the original prediction and for each masked one; a predicted class has the highest mean probability over the
      windows. `kept_prediction` compares these.
    * The divergence is the mean over the windows, each masked by its own P(keep).

    Args:
        model: the trained model that the probe was trained on; it is left as it was.
        probe: a trained probe, see `load_probe`.
        texts: texts, pairs such as (question, passage), or encoded `Examples`.
        tokenizer: the model's Hugging Face tokenizer; not needed for `Examples`.
        batch_size: texts or windows a pass; similar lengths go together. It does not change the result.
        meta: what to keep with the result (names, versions, seed).
        show_progress: show a bar with the time left.
        shared: where `torchrun` started several processes, each takes its share of the texts, and all return the whole
            result; all of them must call this, with the same texts.

    Returns:
        `Attributions`: P(keep) per token and site, and per site the prediction that the model makes with only tokens
        whose P(keep) exceeds 0.5, with its divergence from the original one. One entry per text, with all its tokens.

    Raises:
        TypeError, ValueError: texts that are empty or of the wrong kind; a pair whose first part leaves the second no
            room; `Examples` that hold some windows of a text, but not all; a probe that does not fit the model; NaN in
            the model's states.

    Example:
        >>> result = explain(model, load_probe("run/probe.safetensors"), ["a fine film"], tokenizer)
        >>> result[0].tokens, result[0].keep  # (T, sites)
    """
    if not isinstance(texts, Examples):
        if tokenizer is None:
            raise TypeError("tokenizer is missing: give the model's tokenizer, or texts as encoded Examples")
        texts = encode(tokenizer, [texts] if isinstance(texts, str) else texts, model)
    if not len(texts):
        raise ValueError("texts is empty: give at least one")
    members = whole_texts(texts)
    refuse_unsupported(model)
    with frozen(model), patch(model) as patched:
        check_fit(patched, probe)
        rows: dict[int, dict[str, Any]] = {}
        batches = texts.batches(batch_size)
        for batch in progress(processes.share(batches) if shared else batches, "explain", show_progress):
            rows |= zip(batch, explain_batch(patched, probe, texts, batch), strict=True)
        if shared:
            rows = processes.gather(rows)
    merged = [merge(texts, numbers, [rows[i] for i in numbers]) for numbers in members]
    return Attributions(
        tokens=[text["tokens"] for text in merged],
        site_names=tuple(site.name for site in patched.sites),
        keep=torch.cat([text["keep"] for text in merged]),
        segments=torch.tensor([kind for text in merged for kind in text["segments"]], dtype=torch.int8),
        divergence=torch.stack([text["divergence"] for text in merged]),
        original=[text["original"] for text in merged],
        masked=[text["masked"] for text in merged],
        kept_prediction=torch.stack([text["kept_prediction"] for text in merged]),
        masking=probe.masking,
        meta=meta or {},
    )


def check_fit(patched: Patched, probe: Probe) -> None:
    """Refuse what is no probe or was made for another number of sites; widths are checked where states are read."""
    if not isinstance(probe, Probe):
        raise TypeError(f"probe: expected a Probe, got {type(probe).__name__}: read one with load_probe(path)")
    if probe.num_sites != len(patched.sites):
        raise ValueError(
            f"the probe has {probe.num_sites} sites and the model {len(patched.sites)}: use the model that it was "
            "trained on"
        )


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse heads whose logits are no probabilities of one class, which nothing in their output tells."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(f"the model's problem_type is {problem!r}: only single-label predictions can be compared yet")


def explain_batch(patched: Patched, probe: Probe, texts: Examples, batch: list[int]) -> list[dict[str, Any]]:
    """What there is to say about each of the examples numbered in `batch`: P(keep) `keep` (T, S), `divergence` (S,),
    and of the original and the S masked predictions what `scored_answers` says: `answers` (1 + S, 1 or 2) and `scores`
    (1 + S, C or 1)."""
    inputs = to_inputs(texts, batch, probe)
    output, states = patched.run(inputs, capture=range(probe.num_sites))
    for site, state in states.items():
        check_finite(state, f"the model's state at site {site} ({patched.sites[site].name})")
    real = inputs["attention_mask"]
    kind = prediction_kind(output)
    allowed = allowed_span(texts, batch).to(real.device)
    original = log_probabilities(output, kind, real)
    for table in original:
        check_finite(table, "the model's prediction")
    predictions = [scored_answers(output, kind, original, allowed)]
    keep = keep_probabilities(probe, states)
    divergence = []
    for site in range(probe.num_sites):
        gates = (keep[..., site] > KEPT_ABOVE).float()
        masked = masked_run(patched, inputs, probe, states, site, gates)
        tables = log_probabilities(masked, kind, real)
        for table in tables:
            check_finite(table, f"the masked prediction of site {site} ({patched.sites[site].name})")
        divergence.append(kl_divergence(original, tables).clamp(min=0))
        predictions.append(scored_answers(masked, kind, tables, allowed))
    keep, divergences = keep.float().cpu(), torch.stack(divergence, -1).cpu()
    answers, scores = (torch.stack(parts, 1).cpu() for parts in zip(*predictions, strict=True))
    return [
        {
            "keep": keep[row, : len(texts.tokens[i])],
            "divergence": divergences[row],
            "answers": answers[row],
            "scores": scores[row],
        }
        for row, i in enumerate(batch)
    ]


def to_inputs(texts: Examples, batch: list[int], probe: Probe) -> dict[str, Tensor]:
    """The examples numbered in `batch` as the model's arguments, on the probe's device."""
    device = next(probe.parameters()).device
    return {name: value.to(device) for name, value in texts.collate([texts[i] for i in batch]).items()}


def allowed_span(texts: Examples, batch: list[int]) -> Tensor:
    """(B, T) bool: the second segment, where a predicted span has to lie."""
    rows = [torch.tensor(texts.segments[i]) == SECOND for i in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def check_finite(value: Tensor, what: str) -> None:
    """One clear error for NaN and infinities."""
    if not torch.isfinite(value).all():
        raise ValueError(
            f"{what} holds NaN or infinity: the model's weights or inputs are broken, nothing can be explained"
        )
