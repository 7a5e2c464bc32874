"""Lagrange multipliers, one per site: how much a unit of divergence costs at that site.

The probe minimises, the multiplier maximises `sparsity + multiplier * (KL - tolerance)` (De Cao et al. 2020,
equation 5). Two ways for the multiplier to move:

* `Ascent`, as published: a parameter that the optimiser moves up its gradient, clamped to [0, largest].
* `Control`: log(multiplier) is the output of a proportional-integral controller of the violation. The proportional part
  answers at once and lets go as soon as the constraint holds, so the slow integral part has little to wind up
  (Stooke et al. 2020, "Responsive safety in reinforcement learning by PID Lagrangian methods"). The logarithm keeps
  the multiplier positive and makes the same gains fit sites whose multipliers differ a thousandfold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmask_fast import processes
from diffmask_fast.training.recipe import Recipe

SMOOTHING = 0.1  # weight of the newest batch in the running mean of a site's divergence
PROPORTIONAL = 2.0  # the multiplier goes with this power of (running mean / aim)
SMALLEST = 0.3  # of the integral: lower, and a site that has held for long falls unopposed while it winds up again
TIGHTENED = 0.25, 0.65  # between these shares of the training the margin goes from the initial to the final one
URGENCY = (0.1, 4.0)  # a site that holds is still drawn, a hopeless one does not take all draws


class Ascent(nn.Module):
    """The published multipliers: a parameter (sites,), to be given to an optimiser group with `maximize=True`."""

    def __init__(self, sites: int, recipe: Recipe) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((sites,), recipe.initial_multiplier))
        self.largest, self.tolerance = recipe.largest_multiplier, recipe.tolerance

    def current(self) -> Tensor:
        """(sites,), as a number for reports."""
        return self.value.detach().clamp(0, self.largest)

    def penalised(self, sparsity: Tensor, divergence: Tensor, sites: Tensor) -> Tensor:
        """(B,) sparsity and divergence, (B,) site of each example -> (B,) terms of the loss."""
        with torch.no_grad():
            self.value.clamp_(0, self.largest)  # what the optimiser's last step may have left outside
        return sparsity + self.value[sites] * (divergence - self.tolerance)

    def urgency(self) -> Tensor:
        """(sites,) how often each site is drawn, up to scale: all alike."""
        return torch.ones_like(self.value.detach())

    def observe(self, divergence: Tensor, sites: Tensor) -> None:
        """Nothing to do: the optimiser moves the parameter."""

    def set_progress(self, progress: float) -> None:
        """Nothing to do: the tolerance stays."""


class Control(nn.Module):
    """Multipliers from a proportional-integral controller; its state (sites,) is saved with the probe's training."""

    integral: Tensor
    average: Tensor
    aim: Tensor

    def __init__(self, sites: int, recipe: Recipe) -> None:
        super().__init__()
        self.register_buffer("integral", torch.full((sites,), math.log(recipe.initial_multiplier)))
        self.register_buffer("average", torch.full((sites,), recipe.tolerance))
        self.register_buffer("aim", torch.empty(sites), persistent=False)
        self.recipe = recipe
        self.set_progress(0.0)
        self.rate, self.largest = recipe.multiplier_rate, recipe.largest_multiplier

    def set_progress(self, progress: float) -> None:
        """Set the aims (sites,) of a training that is `progress` (0 to 1) done."""
        final, initial = self.recipe.margin, self.recipe.initial_margin or self.recipe.margin
        begin, end = TIGHTENED
        margin = initial + (final - initial) * min(1.0, max(0.0, (progress - begin) / (end - begin)))
        top = margin * self.recipe.tolerance
        # from the deepest site down: where there is only one, it is the deepest
        self.aim.copy_(torch.linspace(top, self.recipe.lowest_aim * top, len(self.aim)).flip(0))

    def current(self) -> Tensor:
        """(sites,)"""
        return (self.integral.exp() * (self.average / self.aim) ** PROPORTIONAL).clamp(max=self.largest)

    def urgency(self) -> Tensor:
        """(sites,) how often each site is drawn, up to scale: the oftener, the larger its divergence is. That is by the
        deepest site's aim for all: one that may do little needs few draws."""
        return (self.average / self.aim[-1]).clamp(*URGENCY)

    def penalised(self, sparsity: Tensor, divergence: Tensor, sites: Tensor) -> Tensor:
        """(B,) terms of the loss, scaled by 1 / (1 + multiplier) so that no site's gradient drowns another's."""
        multiplier = self.current()[sites]
        return (sparsity + multiplier * (divergence / self.aim[sites] - 1)) / (1 + multiplier)

    @torch.no_grad()
    def observe(self, divergence: Tensor, sites: Tensor) -> None:
        """Move on by what one batch showed: (B,) divergences at (B,) sites, of every process there is."""
        divergence = divergence.to(self.average.dtype)
        totals = torch.zeros(2, len(self.integral), device=divergence.device, dtype=divergence.dtype)
        totals[0].index_add_(0, sites, divergence)
        totals[1].index_add_(0, sites, torch.ones_like(divergence))
        if processes.several():
            torch.distributed.all_reduce(totals)
        drawn = totals[1] > 0
        mean = totals[0] / totals[1].clamp(min=1)
        # one example with a hopeless prediction must not speak for the site: both parts see a bounded violation
        self.average[drawn] += SMOOTHING * (mean.clamp(min=0).minimum(10 * self.aim) - self.average)[drawn]
        violation = (mean / self.aim - 1).clamp(-1, 3)
        self.integral[drawn] += self.rate * violation[drawn]
        self.integral.clamp_(math.log(SMALLEST), math.log(self.largest))


class Shared(Control):
    """One multiplier for all sites, kept in as many places: the ablation of one per site."""

    def observe(self, divergence: Tensor, sites: Tensor) -> None:
        """Every site sees the mean over all examples."""
        count = len(self.integral)
        everywhere = torch.arange(count, device=divergence.device).repeat_interleave(len(divergence))
        super().observe(divergence.repeat(count), everywhere)


def multipliers_for(recipe: Recipe, sites: int) -> Ascent | Control:
    kinds: dict[str, type[Ascent | Control]] = {"ascent": Ascent, "control": Control, "shared": Shared}
    return kinds[recipe.multiplier](sites, recipe)
