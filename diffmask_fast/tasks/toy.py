"""The toy task: does a query's first digit occur more often in a sequence than its second?

The network sees the query at every position, so its encoder can tell the two digits that matter from the rest, and
nothing before the encoder can. The truth about attribution is therefore known: at the embedding nothing can be
dropped, and behind the encoder everything but the query's digits can (De Cao et al. 2020, section 4.1).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmask_fast import runs
from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import Examples
from diffmask_fast.files import replacing
from diffmask_fast.moments import state_moments
from diffmask_fast.probes import Probe, save_probe
from diffmask_fast.sites import register_sites
from diffmask_fast.training.recipe import PUBLISHED, Recipe, recipe_named

DIGITS = 10
LONGEST = 10
WIDTH = 64
EXAMPLES = 10_000
VALIDATION = 1_000
PROBE_WIDTH = 32

RECIPES = {
    "steady": Recipe(
        tolerance=0.05,
        bias=1.0,
        learning_rate=1e-2,
        baseline_learning_rate=3e-3,
        epochs=30,
        batch_size=256,
    ),
    "published": replace(
        PUBLISHED, tolerance=0.05, baseline_learning_rate=3e-4, warmup_steps=200, epochs=100, batch_size=128
    ),
}


class ToyModel(nn.Module):
    """Embeds query and digits, encodes each position to two numbers, and counts with a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.query_embedding = nn.Embedding(DIGITS, WIDTH)
        self.embedding = nn.Embedding(DIGITS, WIDTH)
        self.encoder = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
        self.gru = nn.GRU(2, WIDTH, batch_first=True)
        self.output = nn.Linear(WIDTH, 1)

    def forward(self, query: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """query (B, 2), input_ids (B, T) digits padded on the right, attention_mask (B, T) -> logits (B,)."""
        digits = self.embedding(input_ids)
        asked = self.query_embedding(query).flatten(1).unsqueeze(1).expand(-1, digits.shape[1], -1)
        counted, _ = self.gru(self.encoder(torch.cat([asked, digits], dim=-1)))
        # a GRU only looks back, so the state at the last real position never saw the padding
        last = attention_mask.sum(1) - 1
        return self.output(counted[torch.arange(len(last), device=last.device), last]).squeeze(-1)


MODEL = "model.safetensors"
SITES = ("embedding", "hidden")
register_sites(ToyModel, [(SITES[0], "embedding", "output"), (SITES[1], "encoder", "output")])


def toy_examples(count: int, seed: int) -> Examples:
    """Random queries and sequences, as published: length uniform over 1..10, half of the digits from the query."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.rand(count, DIGITS, generator=generator).argsort(1)[:, :2]
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator).tolist()
    chances = torch.full((count, DIGITS), 0.5 / (DIGITS - 2)).scatter_(1, queries, 0.25)
    digits = torch.multinomial(chances, LONGEST, replacement=True, generator=generator)
    inputs = []
    for query, row, length in zip(queries.tolist(), digits.tolist(), lengths, strict=True):
        row = row[:length]
        label = float(row.count(query[0]) > row.count(query[1]))
        inputs.append({"query": query, "input_ids": row, "labels": label})

    def describe(i: int, answer: Sequence[int]) -> str:
        first, second = inputs[i]["query"]
        return f"more {first} than {second}" if answer[0] else f"not more {first} than {second}"

    return Examples(
        inputs,
        [[str(digit) for digit in item["input_ids"]] for item in inputs],
        [[1] * len(item["input_ids"]) for item in inputs],
        describe,
        fixed=frozenset({"query", "labels"}),
    )


def split(examples: Examples) -> tuple[Examples, Examples]:
    """Training and validation examples."""
    cut = len(examples) - VALIDATION
    return examples.select(range(cut)), examples.select(range(cut, len(examples)))


def train_model(examples: Examples, output_dir: str | os.PathLike[str], *, seed: int, quiet: bool = False) -> ToyModel:
    """The network to explain. Larger steps than published, with a schedule: a fifth of the time, the same accuracy."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class ToyTrainer(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, *_: Any, **__: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(model(**inputs), inputs["labels"])

    torch.manual_seed(seed)
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=256,
        num_train_epochs=20,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.0,
        max_grad_norm=0.0,
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_steps=200,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=quiet,
    )
    model = ToyModel()
    trainer = ToyTrainer(model, args, data_collator=examples.collate, train_dataset=examples)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def load_model(folder: str | os.PathLike[str]) -> ToyModel:
    """The network of the run in a folder."""
    from safetensors.torch import load_file

    model = ToyModel()
    model.load_state_dict(load_file(os.path.join(folder, MODEL)))
    return model


@torch.no_grad()
def accuracy(model: ToyModel, examples: Examples) -> float:
    inputs = examples.collate([examples[i] for i in range(len(examples))])
    return ((model(**inputs) > 0).float() == inputs["labels"]).float().mean().item()


def truth(examples: Examples) -> tuple[list[Tensor], list[Tensor]]:
    """For every example, which positions each site needs: (T,) bool at the embedding (all), and at the hidden state
    (those of the query's digits)."""
    everything = [torch.ones(len(tokens), dtype=torch.bool) for tokens in examples.tokens]
    asked = [torch.tensor([digit in item["query"] for digit in item["input_ids"]]) for item in examples.inputs]
    return everything, asked


def distances(attributions: Attributions, examples: Examples) -> dict[str, dict[str, float]]:
    """How far the normalised attribution of each site is from the truth: `kl` (truth || attribution) and `js` in nats,
    means over the examples that have at least one of the query's digits, with their standard deviations `kl_sd` and
    `js_sd`; and `open`, the mean P(keep) of all examples.

    As in the published table. A KL is infinite where nothing is given to a digit that is needed; then so is the mean,
    and the deviation is NaN. What gives nothing to any digit has nothing in common with the truth: the JS is log 2.
    """
    result = {}
    needed = truth(examples)
    useful = [i for i, asked in enumerate(needed[1]) if asked.any()]
    for site, name in enumerate(attributions.site_names):
        pairs = [(needed[SITES.index(name)][i].double(), attributions[i].keep[:, site].double()) for i in useful]
        kl, js = torch.tensor([divergences(right, keep) for right, keep in pairs], dtype=torch.float64).unbind(-1)
        result[name] = {
            "kl": kl.mean().item(),
            "js": js.mean().item(),
            "kl_sd": kl.std().item(),
            "js_sd": js.std().item(),
            "open": attributions.mean_keep()[site].item(),
        }
    return result


def divergences(right: Tensor, found: Tensor) -> tuple[float, float]:
    """KL(right || found) and the Jensen-Shannon divergence in nats of two rows of numbers >= 0, each normalised."""
    if not found.any():
        return math.inf, math.log(2)
    right, found = right / right.sum(), found / found.sum()
    middle = (right + found) / 2
    js = (relative_entropy(right, middle) + relative_entropy(found, middle)) / 2
    return relative_entropy(right, found).item(), js.item()


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Sum of p log(p / q) in nats; positions with p = 0 count 0."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


def explained(
    model: ToyModel,
    training: Examples,
    validation: Examples,
    methods: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Attributions]:
    """What each method says about the embedding and the hidden state: with `distances`, the published table.

    Args:
        model: the trained network.
        training: where the mean and spread of the states are taken from.
        validation: what is explained.
        methods: names in `METHODS`.
        options: of a method, where they are not to be its defaults.

    Raises:
        TypeError, ValueError: an unknown method or option, or a method that explains only states that enter a layer.
    """
    moments = state_moments(model, training, batch_size=VALIDATION)
    return {
        method: attribute(
            model,
            validation,
            method=method,
            moments=moments,
            batch_size=VALIDATION,
            **(options or {}).get(method, {}),
        )
        for method in methods
    }


def trained_probe(
    model: ToyModel, training: Examples, recipe: Recipe, folder: Path, *, seed: int, resume: bool, quiet: bool
) -> Probe:
    """A probe of both sites of a trained network, on the CPU; its checkpoints are in `folder`."""
    from diffmask_fast.training.trainer import fresh_probe, train_probe

    torch.manual_seed(seed)
    probe = fresh_probe(model, training, recipe, "hidden", width=PROBE_WIDTH)
    train_probe(model, probe, training, recipe, folder, seed=seed, resume=resume, quiet=quiet)
    model.cpu()
    return probe.cpu().eval()


def run(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    recipe: str = "steady",
    resume: bool = False,
    quiet: bool = False,
) -> dict:
    """Train the network and both probes, measure them against the truth, and leave everything in the folder `out`.

    Returns:
        The metrics: `task_accuracy`, `sites.{embedding,hidden}` (see `distances`), `seconds` (all of it, this time).
    """
    start = time.monotonic()
    chosen = recipe_named(recipe, RECIPES)
    folder = runs.begin(out, {"task": "toy", "seed": seed, "recipe": recipe, **chosen.to_dict()}, resume)
    if (folder / runs.METRICS).exists():
        return runs.read_json(folder / runs.METRICS)
    from safetensors.torch import save_file

    training, validation = split(toy_examples(EXAMPLES, seed))
    weights = folder / MODEL
    if weights.exists():
        model = load_model(folder)
    else:
        model = train_model(training, folder / "checkpoints", seed=seed, quiet=quiet)
        with replacing(weights) as temporary:
            save_file(model.state_dict(), temporary)
    probe = trained_probe(model, training, chosen, folder / "checkpoints", seed=seed, resume=resume, quiet=quiet)
    meta = {"task": "toy", "seed": seed, "recipe": recipe, "versions": runs.versions()}
    save_probe(probe, folder / "probe.safetensors", meta)
    attributions = explain(model, probe, validation, batch_size=VALIDATION, meta=meta)
    metrics = {
        "task_accuracy": accuracy(model, validation),
        "sites": distances(attributions, validation),
        "divergence": attributions.divergence.mean(0).tolist(),
        "seconds": round(time.monotonic() - start, 1),
    }
    longest = max(range(len(validation)), key=validation.lengths.__getitem__)
    runs.finish(folder, metrics, attributions, "Toy task: which digits are needed", longest)
    return metrics
