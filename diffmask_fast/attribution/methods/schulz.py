"""A bottleneck for the information in each state (Schulz et al., ICLR 2020, "Restricting the flow: information
bottlenecks for attribution", the per-sample bottleneck)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.methods import Found, checks
from diffmask_fast.attribution.methods.learned import learned
from diffmask_fast.moments import Moments

OPEN = 5.0  # where alpha starts: sigmoid(5) = 0.993, nearly nothing is replaced
SMALLEST_STD = 0.01  # of the site's spread: states that hardly vary would hold any amount of information


def schulz(
    batch: Batch, site: int, home: Moments, steps: int = 100, rate: float = 0.1, beta: float = 10.0, seed: int = 0
) -> Found:
    """How many nats of each token's state the prediction needs, when the rest is replaced by noise.

    The state x becomes lambda x + (1 - lambda) e with e ~ N(mean, std^2) (eq. 1) and lambda = sigmoid(alpha), for each
    token and each number of its state. Learned is alpha, per text: the smallest KL(original || noisy prediction) +
    `beta` times the information of the noisy state, KL to N(mean, std^2) in nats (eq. 4), averaged over the real
    tokens and the width. A score is the information of a token summed over its width (eq. 7).

    What differs from the paper: the KL is to the model's own prediction and not the cross-entropy with a class, as
    everywhere in this package; tokens have no neighbours to smooth over; Adam takes more and smaller steps. From the
    code published with DiffMask: that has one lambda per token, and shows it and not the information; its mean and
    std are per position, and these and the averages count padding. Here all are over real tokens.

    Args:
        batch, site, home: what is explained, and the mean and std that the noise has.
        steps, rate: of Adam.
        beta: the weight of the information.
        seed: of the noise.

    Raises:
        ValueError: an option out of range.
    """
    checks.above_zero("beta", beta)
    state = batch.states[site]
    wide = state.to(torch.promote_types(state.dtype, torch.float32))
    mean, std = home.mean.to(wide), spread(home).to(wide)
    distance = ((wide - mean) / std).square()
    real = batch.real.unsqueeze(-1)
    held = real.sum((1, 2)) * state.shape[-1]

    def loss(alpha: Tensor, noise: Tensor) -> Tensor:
        share = alpha.sigmoid()
        noisy = share * wide + (1 - share) * (mean + std * noise)
        divergence = batch.divergence(batch.predict(site, noisy.to(state.dtype)))
        return divergence + beta * (information(alpha, distance) * real).sum((1, 2)) / held

    start = torch.full_like(wide, OPEN)
    alpha = learned(batch, start, loss, wide, steps, rate, seed)
    return Found(scores=information(alpha, distance).sum(-1))


def information(alpha: Tensor, distance: Tensor) -> Tensor:
    """KL(N(lambda x + (1 - lambda) mean, (1 - lambda)^2 std^2) || N(mean, std^2)) in nats, elementwise, of
    lambda = sigmoid(alpha) and `distance` = ((x - mean) / std)^2. Finite also where 1 - lambda rounds to 0."""
    share = alpha.sigmoid()
    return F.softplus(alpha) + share * (share * (1 + distance) - 2) / 2


def spread(home: Moments) -> Tensor:
    """The std (H,), where it is not tiny beside that of the whole state."""
    smallest = SMALLEST_STD * home.std.square().mean().sqrt()
    return home.std.clamp(min=max(smallest.item(), torch.finfo(home.std.dtype).tiny))
