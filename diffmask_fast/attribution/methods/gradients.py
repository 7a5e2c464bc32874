"""Methods that captum has: integrated gradients (Sundararajan et al. 2017) and leaving out one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.methods import Found, checks
from diffmask_fast.moments import Moments


def integrated_gradients(batch: Batch, site: int, home: Moments, steps: int = 50) -> Found:
    """The gradient of the predicted answer's log-probability along the straight line from the baseline to the state,
    times the state's distance from it, summed over the state's width.

    Args:
        batch, site, home: what is explained; `home.mean` is the baseline.
        steps: points on the line, Gauss-Legendre quadrature.

    Raises:
        ValueError: `steps` below 1 or no whole number.
    """
    checks.whole("steps", steps, 1)
    from captum.attr import IntegratedGradients

    state = batch.states[site]
    with torch.enable_grad():
        found = IntegratedGradients(predicted_log_probability(batch, site)).attribute(
            state,
            home.mean.to(state).expand_as(state),
            n_steps=steps,
            internal_batch_size=len(batch),
        )
    return Found(scores=found.sum(-1))


def leave_one_out(batch: Batch, site: int, home: Moments) -> Found:
    """How much of the predicted answer's log-probability is lost when this token's state alone is the baseline."""
    from captum.attr import FeatureAblation

    state = batch.states[site]
    tokens = torch.arange(state.shape[1], device=state.device)[:, None].expand(state.shape[1:])
    found = FeatureAblation(predicted_log_probability(batch, site)).attribute(
        state, home.mean.to(state).expand_as(state), feature_mask=tokens[None]
    )
    return Found(scores=found[..., 0])


def predicted_log_probability(batch: Batch, site: int) -> Callable[[Tensor], Tensor]:
    """State (B or n B, T, H) at `site` -> (B or n B,) log-probability of the answer that the model gave at first."""

    def score(state: Tensor) -> Tensor:
        rows = torch.arange(len(state), device=state.device) % len(batch)  # captum repeats the whole batch
        return batch.kind.log_probability(batch.predict(site, state, rows).tables, batch.answers[rows])

    return score
