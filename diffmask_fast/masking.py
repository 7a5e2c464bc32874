"""What everything that masks a model shares: the model held still, and P(keep) of a probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffmask_fast.ops.reference import log_open
from diffmask_fast.probes import Probe


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without parameter gradients; afterwards as it was, flag by flag.

    Recurrent layers without dropout alone are in training mode, where they do the same and a GPU can go back through
    them.
    """
    training = {module: module.training for module in model.modules()}
    needs_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        for module in model.modules():
            # cuDNN has no backward of a recurrent layer in evaluation mode; without dropout the modes are the same
            if isinstance(module, nn.RNNBase) and module.dropout == 0:
                module.training = True
        yield model
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in needs_grad.items():
            parameter.requires_grad_(flag)


def keep_probabilities(probe: Probe, states: Mapping[int, Tensor]) -> Tensor:
    """P(z != 0) of every token at every site: (B, T, sites), float32, no sampling.

    For input masking the gates of a site multiply those of the sites below it, so values never rise with depth
    (De Cao et al. 2020, section 2.2).
    """
    if probe.masking == "input":
        return log_open(probe.logits(states, probe.num_sites - 1)).cumsum(-1).exp()
    return torch.cat([log_open(probe.logits(states, site)).exp() for site in range(probe.num_sites)], dim=-1)
