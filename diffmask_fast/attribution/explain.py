"""Ask a trained probe about texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from diffmask_fast.attribution.batch import Masked, read_batch, say
from diffmask_fast.attribution.over_texts import over_texts
from diffmask_fast.attribution.result import Attributions
from diffmask_fast.data import Examples
from diffmask_fast.masking import keep_probabilities
from diffmask_fast.probes import Probe
from diffmask_fast.sites import Patched


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
      windows, and a number is the mean over them. What is predicted at a place of the text comes from the window that
      the place's P(keep) comes from. `kept_prediction` compares these.
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

    def prepare(patched: Patched, examples: Examples) -> Callable[[list[int]], list[dict[str, Any]]]:
        check_fit(patched, probe)
        return partial(explain_batch, patched, probe, examples)

    return over_texts(
        model,
        texts,
        tokenizer,
        prepare,
        method="diffmask",
        masking=probe.masking if isinstance(probe, Probe) else "input",
        batch_size=batch_size,
        meta=meta,
        show_progress=show_progress,
        shared=shared,
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


def explain_batch(patched: Patched, probe: Probe, texts: Examples, numbers: list[int]) -> list[dict[str, Any]]:
    """What the probe says about each of the examples with these numbers, see `say`."""
    device = next(probe.parameters()).device
    batch = read_batch(patched, texts, numbers, range(probe.num_sites), device)
    keep = keep_probabilities(probe, batch.states)
    masked = (Masked(probe.target(site), probe.baseline(site), keep[..., site]) for site in range(probe.num_sites))
    return say(batch, [len(texts.tokens[i]) for i in numbers], masked)
