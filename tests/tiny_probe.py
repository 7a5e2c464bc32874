"""A probe for the tiny BERT, and how exactly what it says can be compared."""

from __future__ import annotations

import torch
from torch import nn

from diffmask_fast.probes import Probe

# Two layers of some ten operations each; a sum of at most 32 terms rounds by about the root of that, 6 eps;
# a head with slopes up to 4 follows on the way to a probability or a divergence.
TOLERANCE = 2 * 10 * 6 * 4 * torch.finfo(torch.float32).eps


def a_probe(masking: str = "input", sites: int = 4, width: int = 16) -> Probe:
    torch.manual_seed(1)
    probe = Probe([width] * sites, masking, bound=None, bias=0.5)
    for baseline in probe.baselines:
        nn.init.normal_(baseline)
    for head in probe.heads:  # loud enough for some gates on either side of a half
        head.outer.parametrizations.weight.original0.data.fill_(4.0)
    return probe
