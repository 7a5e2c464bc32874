"""DiffMask without amortisation: the gates of each text are learned for that text alone, many texts side by side.

Two ways to the same objective, for each text by itself (De Cao et al. 2020, section 2.3 and appendix C):

    min over gates (and baseline), max over multiplier >= 0:
        mean over real tokens of log P(z != 0)  +  multiplier * (KL(original || masked) - tolerance)

`diffmask_per_example` draws Hard Concrete gates, through which the KL has a gradient; `reinforce` draws Bernoulli gates
and estimates it by their score, with a moving average of the KL as control variate (Williams 1992): one of the loss
would lag behind the multiplier, and the lag count as a merit of the gates that were drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmask_fast.attribution.batch import Batch, Prediction
from diffmask_fast.attribution.methods import Found, checks
from diffmask_fast.attribution.methods.learned import noise_of
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.moments import Moments
from diffmask_fast.ops.reference import hard_concrete, log_open

OPEN = 2.0  # where the logits start; at the published 5 a gate has next to no gradient, and larger subsets are found
CLAMP = 10.0  # and between which they stay
MULTIPLIER_RATE = 0.1  # of log(multiplier), per step and violation in tolerances
MULTIPLIERS = (0.03, 200.0)  # between which they stay; a larger least one keeps what the tolerance would let go
LOOK = 20  # steps between two looks at what would be kept
PATIENCE = 10  # looks without anything better after which a text is done
BASELINE_RATE = 0.1  # of the learned baseline, as a share of the logits' rate
RECENT = 0.1  # weight of the last draw in the moving average of the KL
DRAWS = 16  # for the variance


def diffmask_per_example(
    batch: Batch,
    site: int,
    home: Moments,
    tolerance: float = 0.1,
    steps: int = 400,
    rate: float = 0.2,
    learn_baseline: bool = True,
    seed: int = 0,
) -> Found:
    """P(z != 0) of gates that are learned for each text, with what replaces a dropped state.

    Each text has its own multiplier, noise and stop: every `LOOK` steps the tokens with P(z != 0) above one half are
    kept and all others dropped; the gates of the fewest tokens that keep the answer, within the tolerance, are the
    result, and of as few those with the smallest mean P(z != 0). A text that finds no fewer for `PATIENCE` looks is
    done and costs nothing more.

    Args:
        batch, site, home: what is explained; the baseline starts at `home.mean`.
        tolerance: nats.
        steps: at most.
        rate: of Adam, for the logits; a tenth of it for the baseline, in units of the site's spread.
        learn_baseline: False leaves the baseline where it starts.
        seed: of the noise.

    Returns:
        `Found` with `keep` and, in its details: "steps" that the text took; "multiplier" at the end; "violated", 1
        where the drawn gates exceed the tolerance on average at the end; "variance" of the gradient for the logits,
        summed over tokens, at the end, from 16 draws.

    Raises:
        ValueError: an option out of range.
    """

    def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, None]:
        return hard_concrete(uniforms, logits), None

    return _learned(batch, site, home, tolerance, steps, rate, seed, learn_baseline, draw, log_open)


def reinforce(
    batch: Batch,
    site: int,
    home: Moments,
    tolerance: float = 0.1,
    steps: int = 400,
    rate: float = 0.2,
    learn_baseline: bool = True,
    seed: int = 0,
) -> Found:
    """P(z = 1) of Bernoulli gates that are learned for each text by REINFORCE; all else as `diffmask_per_example`."""

    def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        opened = uniforms < logits.sigmoid()
        return opened.to(logits.dtype), torch.where(opened, F.logsigmoid(logits), F.logsigmoid(-logits))

    return _learned(batch, site, home, tolerance, steps, rate, seed, learn_baseline, draw, F.logsigmoid)


@dataclass(eq=False)
class Best:
    """The best that was found so far for each of B texts."""

    logits: Tensor
    shift: Tensor
    kept: Tensor  # (B,) tokens
    opened: Tensor  # (B,) mean P(z != 0)
    since: Tensor  # (B,) looks without fewer tokens
    steps: Tensor  # (B,) taken


def _learned(
    batch: Batch,
    site: int,
    home: Moments,
    tolerance: float,
    steps: int,
    rate: float,
    seed: int,
    learn_baseline: bool,
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    log_kept: Callable[[Tensor], Tensor],
) -> Found:
    """`draw` (logits, uniforms) gives gates and, where these have no gradient, the log-probability of each; `log_kept`
    is log P(z != 0)."""
    checks.above_zero("tolerance", tolerance)
    checks.learning(steps, rate, seed)
    state, real = batch.states[site], batch.real
    lengths = real.sum(-1)
    unit = home.std.to(state).clamp(min=torch.finfo(state.dtype).tiny)
    noise = noise_of(batch, torch.empty(real.shape, device=state.device), seed)
    logits = torch.full(real.shape, OPEN, device=state.device).requires_grad_()
    shift = torch.zeros(len(batch), 1, state.shape[-1], device=state.device, requires_grad=learn_baseline)
    groups: list[dict] = [{"params": [logits]}]
    if learn_baseline:
        groups.append({"params": [shift], "lr": BASELINE_RATE * rate})
    optimizer = torch.optim.Adam(groups, lr=rate)
    log_multiplier = torch.zeros(len(batch), device=state.device)
    recent = torch.zeros(len(batch), device=state.device)  # KL; with all gates open there is none
    best = Best(
        *(logits.detach().clone(), shift.detach().clone(), lengths.clone()),
        *(torch.ones_like(recent), lengths * 0, lengths * 0),
    )
    rows = torch.arange(len(batch), device=state.device)

    def masked(gates: Tensor, rows: Tensor) -> Prediction:
        baseline = home.mean.to(state) + unit * shift[rows].to(state)
        return batch.predict(site, batch.mixed(site, gates, baseline, rows), rows)

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) losses and divergences."""
        own, mask = logits[rows], real[rows]
        gates, log_drawn = draw(own, uniforms_of(noise()[rows]))
        found = batch.divergence(masked(gates, rows), rows)
        multiplier = log_multiplier[rows].exp()
        total = (log_kept(own) * mask).sum(-1) / lengths[rows] + multiplier * (found / tolerance - 1)
        if log_drawn is not None:
            worse = multiplier * (found.detach() - recent[rows]) / tolerance
            total = total + worse * (log_drawn * mask).sum(-1)
        return total / (1 + multiplier), found.detach()

    with torch.enable_grad():
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            losses, found = loss(rows)
            losses.sum().backward()
            optimizer.step()
            with torch.no_grad():
                logits.clamp_(-CLAMP, CLAMP)
                recent[rows] += RECENT * (found - recent[rows])
                log_multiplier[rows] += MULTIPLIER_RATE * (found / tolerance - 1).clamp(-1, 1)
                log_multiplier.clamp_(*map(math.log, MULTIPLIERS))
                best.steps[rows] = step
                if step % LOOK == 0 or step == steps:
                    keep = log_kept(logits[rows]).exp() * real[rows]
                    prediction = masked((keep > KEPT_ABOVE).float(), rows)
                    _look(batch, best, rows, logits, shift, keep, prediction, tolerance)
                    rows = (best.since < PATIENCE).nonzero().squeeze(-1)
                    if not len(rows):
                        break
        everyone = torch.arange(len(batch), device=state.device)
        gradients = [torch.autograd.grad(loss(everyone)[0].sum(), logits)[0] * real for _ in range(DRAWS)]
    keep = log_kept(best.logits).exp()
    variance = torch.stack(gradients).var(0).sum(-1)
    details = {
        "steps": best.steps.float(),
        "multiplier": log_multiplier.exp(),
        "violated": (recent > tolerance).float(),
        "variance": variance,
    }
    return Found(keep=keep, baseline=home.mean.to(state) + unit * best.shift.to(state), details=details)


def uniforms_of(normal: Tensor) -> Tensor:
    """Standard normal -> uniform numbers, open at both ends in float32."""
    edge = 2.0**-24
    return torch.special.ndtr(normal.double()).clamp(edge, 1 - edge).to(normal.dtype)


def _look(
    batch: Batch,
    best: Best,
    rows: Tensor,
    logits: Tensor,
    shift: Tensor,
    keep: Tensor,
    masked: Prediction,
    tolerance: float,
) -> None:
    """Note the logits of those texts that hold the constraint with fewer tokens than ever, or with as few and gates
    less open."""
    holds = batch.keeps(masked, rows) & (batch.divergence(masked, rows) <= tolerance)
    kept, opened = (keep > KEPT_ABOVE).sum(-1), keep.sum(-1) / batch.real[rows].sum(-1)
    fewer = holds & (kept < best.kept[rows])
    better = fewer | (holds & (kept == best.kept[rows]) & (opened < best.opened[rows]))
    chosen = rows[better]
    best.logits[chosen], best.shift[chosen] = logits[chosen], shift[chosen]
    best.kept[chosen], best.opened[chosen] = kept[better], opened[better]
    best.since[rows] += 1
    best.since[rows[fewer]] = 0
