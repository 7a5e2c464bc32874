"""One step of probe training: clean pass, gates, masked pass, Lagrangian.

    min over probe and baseline, max over multipliers >= 0:
        mean over real tokens of log P(z != 0)  +  multiplier * (KL(original || masked) - tolerance)

(De Cao et al. 2020, section 2.3.) The model is frozen and stays outside this module: its parameters are not trained,
not saved and not synchronised between processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast import processes
from diffmask_fast.ops import GateMix, draw_seed, gate_mix
from diffmask_fast.ops.reference import log_open
from diffmask_fast.predictions import Kind, kind_of
from diffmask_fast.probes import Probe
from diffmask_fast.sites import Patched
from diffmask_fast.training.multipliers import multipliers_for
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.remembered import RememberedPredictions

GROWN = 0.4  # the share of the training after which the heads' bound is the final one
NEARLY_OPEN = 0.98  # a gate above it has next to no gradient of its own
REOPENED = 0.3  # of a shut gate's gradient: what a site above wants back it asks of its own gate first
ALWAYS_SHUT = -30.0  # a logit whose gate is 0 but for one draw in 10^13
ALWAYS_OPEN = 1e4  # a logit whose gate is exactly 1, its log P(z != 0) exactly 0 and its gradient 0


class Objective(nn.Module):
    """The Lagrangian of a probe, as a module that a trainer can call with a batch of the model's inputs.

    Args:
        patched: handle of the frozen model.
        probe: the probe to train.
        recipe: how.
        remembered: the original predictions, by example; without it each step computes those that it needs.
        together: the model's weights are shared out among the processes, so that all run the same layers in each step.
        kind: of the prediction; by default its output tells it.

    Forward takes the model's inputs, `attention_mask` (B, T) among them, and, with `remembered`, `example` (B,), the
    examples' numbers. It returns `{"loss": scalar}`. Draws come from PyTorch's global generator, so that a trainer that
    restores it repeats them.

    A step runs no more of the model than it needs: where the original prediction is known, input masking leaves the
    clean pass after the deepest site drawn, and hidden masking has no clean pass at all; else it shares what lies below
    the lowest site drawn. Several draws of an example share its clean pass, or for hidden masking that lower part, and
    its gate logits.
    """

    def __init__(
        self,
        patched: Patched,
        probe: Probe,
        recipe: Recipe,
        remembered: RememberedPredictions | None = None,
        together: bool = False,
        kind: Kind | None = None,
    ) -> None:
        super().__init__()
        self.patched = patched
        self.probe = probe
        self.recipe = recipe
        self.remembered = remembered
        self.together = together
        self.kind = kind
        self.multipliers = multipliers_for(recipe, probe.num_sites)
        self.statistics = Statistics(probe.num_sites)
        self.pull = recipe.pull

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        examples = inputs.pop("example", None)
        real = self.repeated(inputs["attention_mask"])
        sites = self.draw_sites(len(real)).to(real.device)
        remembered = self.remembered if examples is not None else None
        original = None if remembered is None else remembered.get(examples.tolist())
        if self.together and not processes.all_agree(original is not None):
            original = None
        output, states = self.clean_pass(inputs, sites, original is None)
        if original is None:
            original = (self.kind or kind_of(output)).tables(output, inputs)
            for table in original:
                check_finite(table)
            if remembered is not None:
                remembered.put(examples.tolist(), original)
        inputs = {name: self.repeated(value) for name, value in inputs.items()}
        original = tuple(self.repeated(table.to(real.device)) for table in original)
        masked_output, gates, sparsity = self.masked_pass(inputs, states, sites)
        kind = self.kind or kind_of(masked_output)
        divergence = kind.divergence(original, kind.tables(masked_output, inputs))
        sparsity = (sparsity * real).sum(-1) / real.sum(-1)
        opened = ((gates != 0) * real).sum(-1) / real.sum(-1)
        asked = kind.asked(original)
        if not asked.all():  # what has no prediction could do without every token
            sparsity, divergence, sites, opened = (each[asked] for each in (sparsity, divergence, sites, opened))
        terms = self.multipliers.penalised(sparsity, divergence, sites)
        loss = terms.mean() if len(terms) else 0 * gates.sum()
        check_finite(loss)
        if self.training:
            self.multipliers.observe(divergence, sites)
        self.statistics.add(sites, divergence, opened)
        return {"loss": loss}

    def set_progress(self, progress: float) -> None:
        """Set what changes in the course of a training that is `progress` (0 to 1) done: the heads' bound, and the
        pull on open gates."""
        self.pull = self.recipe.pull * (1 - progress)
        self.multipliers.set_progress(progress)
        final, initial = self.recipe.bound, self.recipe.initial_bound
        if initial is not None:
            self.probe.set_bound(initial + (final - initial) * min(1.0, progress / GROWN))

    def repeated(self, rows: Tensor) -> Tensor:
        """(B, ...) of each example -> (draws * B, ...) of each draw."""
        return torch.cat([rows] * self.recipe.draws) if self.recipe.draws > 1 else rows

    def draw_sites(self, examples: int) -> Tensor:
        """(B,) the deepest site that the probe may look at, for each example."""
        count = self.probe.num_sites
        if self.recipe.draw == "batch":
            return torch.randint(count, (1,)).expand(examples)
        # systematic sampling: every site gets its share of the examples, up to one more or less
        shares = self.multipliers.urgency().cumsum(0)
        points = (torch.arange(examples, device=shares.device) + torch.rand(()).item()) / examples
        sites = torch.searchsorted(shares / shares[-1], points.to(shares.dtype)).clamp(max=count - 1)
        return sites[torch.randperm(examples)]

    def clean_pass(self, inputs: dict, sites: Tensor, whole: bool) -> tuple[Any, dict[int, Tensor]]:
        """The model's output, if the `whole` pass is wanted for it, and the states that the masked pass takes."""
        with torch.no_grad():
            if self.probe.masking == "input":
                deepest = int(sites.max())
                return self.patched.run(inputs, capture=self.probe.reads(deepest), stop=None if whole else deepest)
            if not whole and self.recipe.draws == 1:
                return None, {}
            lowest = int(sites.min())
            return self.patched.run(inputs, capture=(lowest,), stop=None if whole else lowest)

    def masked_pass(self, inputs: dict, states: dict[int, Tensor], sites: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The masked output, and (B, T) gates and log P(z != 0) of each draw at its site; states are of each example,
        all else is of each draw."""
        step = self._input_masking if self.probe.masking == "input" else self._hidden_masking
        return step(inputs, states, sites)

    def draw(self, state: Tensor, logits: Tensor, baseline: Tensor, asked: Tensor | None = None) -> GateMix:
        """Gates drawn for `logits` (B, T, K), and the state that their product mixes with the baseline. With
        "straight" gradients, `asked` (B, T) instead of the sum of P(z != 0) over the gates passes on what a saturated
        product would get."""
        drawn = gate_mix(state, logits, baseline, rank_seed(state.device), temperature=self.recipe.temperature)
        if self.recipe.gradient == "path":
            return drawn
        # Each gate of a product is asked for itself: the product's own derivative is 0 where two of them are shut.
        gate = drawn.gates[..., -1]
        opens = log_open(logits, self.recipe.temperature).exp().sum(-1) if asked is None else asked
        saturated = (gate <= 0) | (gate > NEARLY_OPEN)
        passed = torch.where(saturated, opens - opens.detach(), 0).to(state.dtype)
        return drawn._replace(mixed=drawn.mixed + passed[..., None] * (state - baseline).detach().to(state.dtype))

    def pull_on(self, log_opens: Tensor, real: Tensor) -> float | Tensor:
        """The pull on gates (B, T) that are open with these probabilities."""
        if self.recipe.pull_by == "gate":
            return self.pull
        shut = 1 - log_opens.detach().exp()
        return self.pull * (shut * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)

    def _input_masking(self, inputs: dict, states: dict[int, Tensor], sites: Tensor) -> tuple[Any, Tensor, Tensor]:
        logits = self.repeated(self.probe.logits(states, int(sites.max())))
        number, drawn_site = torch.arange(logits.shape[-1], device=sites.device), sites[:, None, None]
        own_logits = logits.gather(-1, drawn_site.expand(*logits.shape[:2], 1)).squeeze(-1)
        own_opens = log_open(own_logits, self.recipe.temperature)
        logits = logits.masked_fill(number > drawn_site, ALWAYS_OPEN)
        taken, asked = logits, None
        if self.recipe.below == "decided":
            taken, asked = decided(logits, number < drawn_site, own_opens, self.recipe.temperature)
        mixed, gates, opens = self.draw(self.repeated(states[0]), taken, self.probe.baseline(0), asked)
        sparsity = opens[..., -1] if asked is None else log_open(logits, self.recipe.temperature).sum(-1)
        if self.recipe.credit == "own":
            own = pulled(own_opens, own_logits, self.pull_on(own_opens, inputs["attention_mask"]))
            sparsity = own + (sparsity - own).detach()
        return self.patched.run(inputs, resume=(0, mixed)).output, gates[..., -1], sparsity

    def _hidden_masking(self, inputs: dict, states: dict[int, Tensor], sites: Tensor) -> tuple[Any, Tensor, Tensor]:
        gates, sparsity, order = [], [], []

        def replacement(site: int) -> Callable[[Tensor], Tensor]:
            rows = (sites == site).nonzero().squeeze(-1)

            def replace(above: Tensor) -> Tensor:
                # These rows are as the model made them. Others were replaced further down: their state here is what
                # came up from there, and the way back to it does not lead through these.
                state = above[rows].detach()
                logits = self.probe.logits({site: state}, site)
                mixed = self.draw(state, logits, self.probe.baseline(site))
                gates.append(mixed.gates[..., -1])
                opens = mixed.log_open[..., -1]
                pull = self.pull_on(opens, inputs["attention_mask"][rows])
                sparsity.append(pulled(opens, logits[..., -1], pull))
                order.append(rows)
                return above.index_copy(0, rows, mixed.mixed.to(above.dtype))

            return replace

        replacements = {site: replacement(site) for site in sites.unique().tolist()}
        entry = None
        if states:
            ((lowest, state),) = states.items()
            entry = (lowest, replacements.pop(lowest)(self.repeated(state)))
        output = self.patched.run(inputs, resume=entry, replace=replacements).output
        back = torch.cat(order).argsort()
        return output, torch.cat(gates)[back], torch.cat(sparsity)[back]


def pulled(log_opens: Tensor, logits: Tensor, pull: float | Tensor) -> Tensor:
    """log P(z != 0) with its own value, but a gradient for the logit that is at least `pull`.

    The gradient is 1 - P(z != 0): a gate that is nearly open would hardly be asked whether it is needed.
    """
    missing = (pull - (1 - log_opens.exp())).clamp(min=0).detach()
    return log_opens + missing * (logits - logits.detach())


def decided(logits: Tensor, below: Tensor, own_opens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (B, T, K) with those `below` set to always open or always shut, by P(z != 0) > 0.5 of the law, and what
    the gates are asked together (B, T): the own one, whose log P(z != 0) is given, and a little each shut one below."""
    shut = below & (log_open(logits.detach()) <= math.log(0.5))
    reopened = torch.where(shut, log_open(logits, temperature).exp(), 0).sum(-1)
    fixed = torch.where(shut, ALWAYS_SHUT, torch.where(below, ALWAYS_OPEN, logits))
    return fixed, own_opens.exp() + REOPENED * reopened


def check_finite(value: Tensor) -> None:
    """One clear error for NaN and infinities, before they reach the gates or the weights."""
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            "the model's states or predictions hold NaN or infinity for these inputs, or the learning rate is too high"
        )


def rank_seed(device: torch.device) -> Tensor:
    """A seed from the global generator, different on every process though their generators agree."""
    seed = draw_seed(device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = seed + torch.distributed.get_rank() * torch.tensor([0x5851F42D4C957F2D, 0], device=device)
    return seed


class Statistics:
    """Running means per site since the last look, for the log."""

    def __init__(self, sites: int) -> None:
        self.sums = torch.zeros(3, sites)

    def add(self, sites: Tensor, divergence: Tensor, opened: Tensor) -> None:
        rows = torch.stack([torch.ones_like(divergence), divergence.detach(), opened.to(divergence.dtype)])
        self.sums.index_add_(1, sites.cpu(), rows.detach().float().cpu())

    def take(self) -> dict[str, float]:
        """`kl_<site>` and `open_<site>` for the sites drawn, and start anew."""
        count, divergence, opened = self.sums
        means = {}
        for site in count.nonzero().squeeze(-1).tolist():
            means[f"kl_{site}"] = round((divergence[site] / count[site]).item(), 4)
            means[f"open_{site}"] = round((opened[site] / count[site]).item(), 4)
        self.sums.zero_()
        return means
