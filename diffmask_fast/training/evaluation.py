"""Per-site metrics of a trained probe: with the gates of an attribution, and with gates drawn as in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast import processes
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.batch import read_batch
from diffmask_fast.attribution.explain import check_fit
from diffmask_fast.attribution.result import KEPT_ABOVE
from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.ops import draw_seed, gate_mix
from diffmask_fast.probes import Probe
from diffmask_fast.progress import progress
from diffmask_fast.sites import patch


@torch.no_grad()
def sampled_metrics(
    model: nn.Module,
    probe: Probe,
    examples: Examples,
    *,
    batch_size: int = 16,
    seed: int = 0,
    show_progress: bool = False,
    shared: bool = False,
) -> list[dict[str, float]]:
    """Per site, one draw of the gates for every example.

    A text that was cut counts as its windows do, each for itself as in training; `attribution_metrics` counts texts.

    The batches and their draws are the same for any number of processes; with `shared`, see `explain`, each takes some.

    Returns:
        For each site `sampled_kl` (nats, mean over examples), `sampled_open` (share of real tokens whose gate is not 0,
        mean over examples) and `sampled_kept_prediction` (share of examples whose prediction stays).
    """
    generator = torch.Generator().manual_seed(seed)
    totals: dict[int, Tensor] = {}
    with frozen(model), patch(model) as patched:
        check_fit(patched, probe)
        batches = [(i, batch, draw_seed(generator)) for i, batch in enumerate(examples.batches(batch_size))]
        for i, numbers, drawn in progress(processes.share(batches) if shared else batches, "evaluate", show_progress):
            totals[i] = torch.zeros(probe.num_sites, 4, dtype=torch.float64)
            batch = read_batch(patched, examples, numbers, range(probe.num_sites), next(probe.parameters()).device)
            for site, gates in enumerate(_draw(probe, batch.states, drawn.to(batch.real.device))):
                target = probe.target(site)
                masked = batch.predict(target, batch.mixed(target, gates, probe.baseline(site)))
                kept = batch.keeps(masked)
                opened = ((gates != 0) * batch.real).sum(-1) / batch.real.sum(-1)
                rows = torch.stack([batch.divergence(masked), opened, kept.float(), torch.ones_like(opened)])
                totals[i][site] = (rows * batch.asked).double().sum(-1).cpu()
    if shared:
        totals = processes.gather(totals)
    names = ("sampled_kl", "sampled_open", "sampled_kept_prediction")
    sums = torch.stack([totals[i] for i in sorted(totals)]).sum(0)
    return [dict(zip(names, row, strict=True)) for row in (sums[:, :3] / sums[:, 3:]).tolist()]


def _draw(probe: Probe, states: dict[int, Tensor], seed: Tensor) -> list[Tensor]:
    """(B, T) gates for every site: one draw, whose running products are the gates of input masking."""
    if probe.masking == "input":
        gates = gate_mix(states[0], probe.logits(states, probe.num_sites - 1), probe.baseline(0), seed).gates
        return list(gates.unbind(-1))
    return [
        gate_mix(states[site], probe.logits(states, site), probe.baseline(site), seed + site).gates[..., 0]
        for site in range(probe.num_sites)
    ]


def attribution_metrics(attributions: Attributions) -> list[dict[str, float]]:
    """Per site, with the gates thresholded as an attribution is used: `kl`, `open` (share of tokens kept, mean over
    texts), `kept_prediction`, and `open_question` and `open_passage` where the texts are pairs."""
    kept = replace(attributions, keep=(attributions.keep > KEPT_ABOVE).float())
    columns: dict[str, Tensor] = {
        "kl": attributions.divergence.mean(0),
        "open": kept.mean_keep(),
        "kept_prediction": attributions.kept_prediction.float().mean(0),
    }
    if (attributions.segments == 2).any():
        columns |= {"open_question": kept.mean_keep(segment=1), "open_passage": kept.mean_keep(segment=2)}
    return [{name: column[site].item() for name, column in columns.items()} for site in range(len(columns["kl"]))]


def by_site(names: tuple[str, ...], *rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Rows of several measurements, joined per site, and their mean over sites as `overall`."""
    sites: dict[str, Any] = {
        name: {key: round(value, 6) for row in parts for key, value in row.items()}
        for name, *parts in zip(names, *rows, strict=True)
    }
    keys = next(iter(sites.values()))
    return {
        "sites": sites,
        "overall": {key: sum(site[key] for site in sites.values()) / len(sites) for key in keys},
    }
