"""How much noise each token's state bears (Guan et al., ICML 2019, "Towards a deep and unified understanding of deep
neural models in NLP")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmask_fast.attribution.batch import Batch, Prediction
from diffmask_fast.attribution.methods import Found, checks
from diffmask_fast.attribution.methods.learned import learned
from diffmask_fast.moments import Moments

QUIET = -5.0  # where sigma starts: softplus(-5) = 0.0067 of the site's spread


def guan(
    batch: Batch, site: int, home: Moments, steps: int = 100, rate: float = 0.1, weight: float = 0.1, seed: int = 0
) -> Found:
    """One over the standard deviation sigma of the noise that a token's state bears while the output stays.

    Learned is sigma, per text and token: the smallest squared distance of the logits that noise N(0, sigma^2) in all
    states together makes, less `weight` times the sum over the real tokens of log sigma, which is the noise's entropy
    but for a constant (eq. 4). A span's logits are those of all real tokens, start and end.

    Sigma is softplus of what is learned, as in the code published with DiffMask, whose score 1 / sigma this is; there
    it is in the states' own units and here in units of the site's spread, so that sites of any scale take as many
    steps.

    Args:
        batch, site, home: what is explained; the spread is the root mean square of `home.std`.
        steps, rate: of Adam.
        weight: of the entropy.
        seed: of the noise.

    Raises:
        ValueError: an option out of range.
    """
    checks.above_zero("weight", weight)
    state = batch.states[site]
    wide = state.to(torch.promote_types(state.dtype, torch.float32))
    unit = home.std.to(wide).square().mean().sqrt().clamp(min=torch.finfo(home.std.dtype).tiny)
    original = logits(batch, batch.original)

    def loss(rho: Tensor, noise: Tensor) -> Tensor:
        sigma = F.softplus(rho)
        noisy = wide + (unit * sigma).unsqueeze(-1) * noise
        changed = logits(batch, batch.predict(site, noisy.to(state.dtype)))
        distance = (changed - original).square().sum(-1)
        return distance - weight * (sigma.log() * batch.real).sum(-1)

    start = torch.full_like(wide[..., 0], QUIET)
    rho = learned(batch, start, loss, wide, steps, rate, seed)
    return Found(scores=1 / F.softplus(rho))


def logits(batch: Batch, prediction: Prediction) -> Tensor:
    """(B, C), or (B, 2 T) of spans, alike at padded places."""
    return torch.cat([table.flatten(1) for table in batch.kind.logits(prediction.output, batch.inputs)], -1)
