"""Time a training step against the published recipe's: two full passes in float32 on texts padded to 384 tokens.

    python bench/train_step.py --folder MODEL --data SQUAD.json [--model own|bert-large] [--json FILE] [--rounds N]
    python bench/train_step.py --overhead ...: what of a real training's step is neither backbone nor gates

MODEL is a question-answering BERT; `--model bert-large` takes its tokenizer only, with random weights of BERT-large's
geometry. All contenders take turns and have the published objective (one site a step, the same for all); each sees
batches as it would make them from the same texts. Nothing is timed before the loss of a step was compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest.mock import patch as replaced

import measure
import overhead
import published
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from diffmask_fast.data import Examples, encode
from diffmask_fast.masking import frozen
from diffmask_fast.models import load_for
from diffmask_fast.ops import draw_seed, uniforms
from diffmask_fast.probes import Probe
from diffmask_fast.sites import patch
from diffmask_fast.tasks.squad import RECIPES, read_squad
from diffmask_fast.training import backbone
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.remembered import remembered_for
from diffmask_fast.training.trainer import ProbeTrainer, fresh_probe, optimizer_for

PADDED, BATCH = 384, 8
RECIPE = RECIPES["input"]["published"]


class Contender(NamedTuple):
    name: str
    precision: str = "float32"
    remembers: bool = False
    attention: bool = False  # ours, in pieces


OURS = (
    Contender("lengths grouped, states shared"),
    Contender("and predictions remembered", remembers=True),
    Contender("and bfloat16", "bfloat16", remembers=True),
    Contender("and attention in pieces", "bfloat16", remembers=True, attention=True),
    Contender("all but predictions remembered", "bfloat16", attention=True),
)


def published_step(model: Any, objective: Objective, inputs: dict[str, Tensor], site: int) -> Tensor:
    probe, mask = objective.probe, inputs["attention_mask"]
    gates = len(probe.reads(site))
    u = uniforms(draw_seed(), mask.numel() * gates).view(*mask.shape, gates)
    divergence, opens = published.step(model, probe, inputs, site, u)
    multipliers: Any = objective.multipliers
    return published.lagrangian(divergence, opens, mask, multipliers.value[site], RECIPE.tolerance).mean()


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.nn.functional.pad(value, (0, PADDED - value.shape[1])) for name, value in batch.items()}


def refuse_if_wrong(model: Any, objective: Objective, batch: dict[str, Tensor]) -> None:
    """The losses of one step, without padding, on the same noise, in float32."""
    site = objective.probe.num_sites // 2
    objective.draw_sites = lambda examples: torch.full((examples,), site)  # type: ignore[method-assign]
    losses = []
    for run in (lambda: objective(**batch)["loss"], lambda: published_step(model, objective, batch, site)):
        torch.manual_seed(1)
        losses.append(run().item())
    if not abs(losses[0] - losses[1]) <= 1e-3 * max(1.0, abs(losses[1])):
        raise SystemExit(
            f"losses {losses} of ours and the published step differ: no time is printed for a wrong result"
        )


def trained(objective: Objective, loss: Callable[[], Tensor]) -> measure.Run:
    """A whole step: loss, gradients, the optimiser."""
    optimizer = optimizer_for(objective)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def rows_of(model: Any, examples: Examples, masking: str, name: str, rounds: int, folder: str) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    sampler = grouped(model, examples, masking, folder)
    shuffled = torch.randperm(len(examples), generator=generator).tolist()
    count = min(rounds, len(examples) // BATCH)
    every = torch.randperm(len(examples) // BATCH, generator=generator)[:count].tolist()
    sites = torch.randint(len(patch(model).sites), (count,), generator=generator).tolist()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in (Contender("published"), *OURS)}
    peaks: dict[str, float] = {}
    longest = max(every, key=lambda k: max(examples.lengths[i] for i in sampler[k * BATCH : (k + 1) * BATCH]))
    for turn, (k, site) in enumerate(zip([every[0], *every], [sites[0], *sites], strict=True)):  # the first warms up
        for contender in (Contender("published"), *OURS):
            with ExitStack() as stack:
                run = ready(contender, model, examples, masking, shuffled, sampler, k, site, folder, stack)
                start = time.perf_counter()
                run()
                if turn:
                    seconds[contender.name].append(time.perf_counter() - start)
                if k == longest and contender.name not in peaks:
                    peaks[contender.name] = measure.peak_extra_bytes(run, "cpu") / 1e6
    rows = []
    for contender in OURS:
        ratio = sum(seconds["published"]) / sum(seconds[contender.name])
        rows.append(
            {
                "model": name,
                "masking": masking,
                "epoch": "later" if contender.remembers else "first",
                "precision": contender.precision,
                "shortcuts": contender.name,
                "seconds_published": round(statistics.mean(seconds["published"]), 4),
                "seconds": round(statistics.mean(seconds[contender.name]), 4),
                "speedup": round(ratio, 2),
                "peak_mb_published": round(peaks["published"]),
                "peak_mb": round(peaks[contender.name]),
                "batches": count,
            }
        )
    return rows


_objectives: dict[Any, Objective] = {}


def ready(
    contender: Contender,
    model: Any,
    examples: Examples,
    masking: str,
    shuffled: list[int],
    sampler: list[int],
    k: int,
    site: int,
    folder: str,
    stack: ExitStack,
) -> measure.Run:
    """A step of the contender on its k-th batch; for one that remembers, as in a later epoch."""
    ours = contender.name != "published"
    numbers = (sampler if ours else shuffled)[k * BATCH : (k + 1) * BATCH]
    batch = examples.collate([examples[i] for i in numbers])
    dtype = torch.bfloat16 if contender.precision == "bfloat16" else None
    stack.enter_context(frozen(model))
    if not contender.attention:
        stack.enter_context(replaced.object(backbone, "_attention_to_restore", lambda *_: None))
    stack.enter_context(backbone.running_in(model, dtype))
    patched = stack.enter_context(patch(model))
    key = (id(model), masking)
    if key not in _objectives:
        _objectives[key] = Objective(patched, fresh_probe(model, examples, RECIPE, masking), RECIPE)
        refuse_if_wrong(model, _objectives[key], batch)
    objective = _objectives[key]
    objective.patched = patched
    objective.draw_sites = lambda count: torch.full((count,), site)  # type: ignore[method-assign]
    if not ours:
        whole = padded(batch)
        return trained(objective, lambda: published_step(model, objective, whole, site))
    objective.remembered = None
    if contender.remembers:
        objective.remembered = remembered_for(patched, model, examples.select(numbers), folder)
        with torch.no_grad():
            batch["example"] = torch.arange(len(numbers))
            objective(**batch)
    return trained(objective, lambda: objective(**batch)["loss"])


def grouped(model: Any, examples: Examples, masking: str, folder: str) -> list[int]:
    """The order in which the trainer takes the examples."""
    from transformers import TrainingArguments

    args = TrainingArguments(folder, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[])
    with patch(model) as patched:
        objective = Objective(patched, Probe([8] * len(patched.sites), masking), RECIPE)
        return list(ProbeTrainer(objective, examples, args)._get_train_sampler())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a question-answering BERT")
    parser.add_argument("--data", required=True, help="SQuAD JSON")
    parser.add_argument("--model", choices=("own", "bert-large"), default="own")
    parser.add_argument("--masking", choices=("input", "hidden"), nargs="+", default=("input", "hidden"))
    parser.add_argument("--overhead", action="store_true", help="of a real training of twice --rounds steps")
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    model: Any = load_for(options.folder, "QuestionAnswering")
    if options.model == "bert-large":
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        model = BertForQuestionAnswering(BertConfig(vocab_size=model.config.vocab_size, **large)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    every = encode(tokenizer, read_squad(options.data), model)
    fitting = [i for i, length in enumerate(every.lengths) if length <= PADDED]  # the published recipe drops the rest
    examples = every.select(fitting)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for masking in options.masking if options.overhead else ():
            for row in overhead.rows_of(model, examples, masking, options.model, options.rounds, folder):
                rows.append(row | {"threads": options.threads})
                print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
        for masking in () if options.overhead else options.masking:
            for row in rows_of(model, examples, masking, options.model, options.rounds, folder):
                rows.append(row | {"threads": options.threads})
                print(
                    f"{row['model']:10} {row['masking']:6} {row['epoch']:5} {row['precision']:8} {row['shortcuts']:32} "
                    f"{row['seconds_published']:7.3f} s {row['seconds']:7.3f} s {row['speedup']:6.2f}x "
                    f"{row['peak_mb_published']:6} MB {row['peak_mb']:6} MB",
                    flush=True,
                )
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
