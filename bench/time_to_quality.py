"""How long our recipe takes to be as good as the published one ever gets, and how long that one took for it.

    python bench/time_to_quality.py --folder MODEL --data TRAIN.json --dev DEV.json [--masking input hidden]
        [--seeds 0 1 2] [--epochs 8] [--recipe steady] [--ours-epochs 2] [--work FOLDER] [--against FILE] [--limit N]
        [--json FILE]

The quality of a probe: the mean over sites of the share of tokens that it keeps on the questions of DEV, where a site
whose divergence is over 1.1 times the tolerance counts as 1. Less is better. The published recipe's steps are run by
our engine, which the tests hold to them, and priced at what a published step takes (two full passes in float32 on texts
padded to 384 tokens), timed before and after. Our time is all of `train_probe`, up to the first look at a probe that is
as good. A look measures the probe on the model as it is trained on, in bfloat16 where the processor has it, while the
clock stands still. The published trainings take most of the time; `--against` takes what they came to from the rows of
an earlier run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import measure
import overhead
import torch
import train_step
from transformers import AutoTokenizer, TrainerCallback

from diffmask_fast import runs
from diffmask_fast.attribution.explain import explain
from diffmask_fast.data import Examples, encode
from diffmask_fast.models import load_for
from diffmask_fast.probes import Probe
from diffmask_fast.tasks.squad import RECIPES, read_squad
from diffmask_fast.training.backbone import multiplies_bfloat16, running_in
from diffmask_fast.training.evaluation import attribution_metrics
from diffmask_fast.training.recipe import Recipe, recipe_named
from diffmask_fast.training.trainer import fresh_probe, train_probe

ALLOWED = 1.1  # times the tolerance
PRICED = 5  # published steps timed before the trainings, and as many behind them
LOOKS = 4  # in each epoch of ours


class Look(NamedTuple):
    step: int
    seconds: float
    probe: Probe


class Looks(TrainerCallback):
    """Copies of the probe in the course of its training, which ends when one is `enough`. Looking takes no time."""

    def __init__(self, an_epoch: int, enough: Callable[[Look], bool]) -> None:
        self.an_epoch, self.enough = an_epoch, enough
        self.start, self.looked = time.perf_counter(), 0.0
        self.taken: list[Look] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        every = max(1, round(state.max_steps / state.num_train_epochs / self.an_epoch))
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            now = time.perf_counter()
            look = Look(state.global_step, now - self.start - self.looked, copy.deepcopy(model.probe))
            self.taken.append(look)
            control.should_training_stop |= self.enough(look)
            self.looked += time.perf_counter() - now


def quality(rows: list[dict[str, float]], tolerance: float) -> float:
    """Of what `attribution_metrics` says about each site."""
    return statistics.mean(row["open"] if row["kl"] <= ALLOWED * tolerance else 1.0 for row in rows)


def trained(
    model: Any, examples: Examples, recipe: Recipe, masking: str, mask_token: int | None, seed: int, an_epoch: int,
    enough: Callable[[Look], bool], folder: Path | None = None,
) -> list[Look]:  # fmt: skip
    """The looks of a training, or of what was left of the one that began in `folder`."""
    torch.manual_seed(seed)
    probe = fresh_probe(model, examples, recipe, masking, mask_token=mask_token)
    looks = Looks(an_epoch, enough)
    with tempfile.TemporaryDirectory() as passing, overhead.listening(looks):
        train_probe(
            *(model, probe, examples, recipe, folder or passing),
            seed=seed,
            bf16=multiplies_bfloat16(),
            resume=folder is not None,
            quiet=True,
        )
    return looks.taken


def published_looks(
    model: Any, examples: Examples, dev: Examples, masking: str, mask_token: int | None, seed: int, recipe: Recipe,
    tolerance: float, folder: Path | None,
) -> dict[int, float]:  # fmt: skip
    """The quality after each epoch, by step; those before the last checkpoint in `folder` were kept there."""
    kept = folder and folder / "looks.json"
    found: dict[int, float] = {}
    if kept is not None and kept.exists():
        found = {int(step): value for step, value in runs.read_json(kept).items()}

    def look_at(look: Look) -> bool:
        found[look.step] = measured(model, dev, look, tolerance, "published")[0]
        if kept is not None:
            runs.write_json(kept, found)
        return False

    trained(model, examples, recipe, masking, mask_token, seed, 1, look_at, folder)
    return found


def seconds_of_published_steps(model: Any, examples: Examples, masking: str, seed: int) -> list[float]:
    """As `train_step` times them: the first one warms up."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(examples), generator=generator).tolist()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(PRICED + 1):
            k = turn % max(1, len(examples) // train_step.BATCH)
            site = int(torch.randint(len(train_step.patch(model).sites), (), generator=generator))
            with ExitStack() as stack:
                contender = train_step.Contender("published")
                run = train_step.ready(contender, model, examples, masking, shuffled, shuffled, k, site, folder, stack)
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    return seconds[1:]


def row(
    model: Any, examples: Examples, dev: Examples, masking: str, mask_token: int | None, seed: int,
    recipes: dict[str, Recipe], earlier: dict[str, Any] | None, folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The published recipe's best look, or that of an `earlier` row, and our first one that is as good. Where none is,
    our seconds are those of all of the training, and the speedup None. `folder` keeps the published training."""
    ours = recipes["ours"]
    prices = seconds_of_published_steps(model, examples, masking, seed)
    if earlier is None:
        looks = published_looks(
            model, examples, dev, masking, mask_token, seed, recipes["published"], ours.tolerance, folder
        )
        steps = min(looks, key=looks.__getitem__)
        aim = round(looks[steps], 4)
    else:
        steps, aim = earlier["published_steps"], earlier["open_published"]
    found: list[tuple[float, float]] = []

    def as_good(look: Look) -> bool:
        found.append(measured(model, dev, look, ours.tolerance, "ours"))
        return found[-1][0] <= aim

    taken = trained(model, examples, ours, masking, mask_token, seed, LOOKS, as_good)
    prices += seconds_of_published_steps(model, examples, masking, seed)
    look, (reached, divergence) = taken[-1], found[-1]
    seconds_published = steps * statistics.mean(prices)
    return {
        "masking": masking,
        "seed": seed,
        "seconds_published": round(seconds_published, 1),
        "published_step": round(statistics.mean(prices), 3),
        "published_steps": steps,
        "open_published": aim,
        "seconds": round(look.seconds, 1),
        "steps": look.step,
        "epochs": ours.epochs,
        "kl": round(divergence, 4),
        "open": round(reached, 4),
        "speedup": round(seconds_published / look.seconds, 2) if reached <= aim else None,
        "precision": "bfloat16" if multiplies_bfloat16() else "float32",
        "questions": [len(examples), len(dev)],
    }


def measured(model: Any, dev: Examples, look: Look, tolerance: float, name: str) -> tuple[float, float]:
    """The quality, and the largest divergence of a site. A line is printed, as a training takes long."""
    probe = look.probe.eval()
    with running_in(model, torch.bfloat16 if multiplies_bfloat16() else None):
        rows = attribution_metrics(explain(model, probe, dev))
    found = quality(rows, tolerance)
    sites = " ".join(f"{site['open']:.2f}@{site['kl']:.2f}" for site in rows)
    print(f"  {name}, step {look.step}, {look.seconds:.0f} s: {found:.4f} = {sites}", flush=True)
    return found, max(site["kl"] for site in rows)


def fitting(examples: Examples) -> Examples:
    """The published recipe drops what is longer."""
    return examples.select([i for i, length in enumerate(examples.lengths) if length <= train_step.PADDED])


def begun(options: argparse.Namespace) -> dict[tuple[str, int], Path]:
    """The folder of each published training in `--work`. One that does not fit is refused before hours are spent."""
    homes = {}
    for masking in options.masking if options.work else ():
        config = {"data": options.data, "dev": options.dev, "model": options.folder, "limit": options.limit}
        config["recipe"] = replace(RECIPES[masking]["published"], epochs=options.epochs).to_dict()
        config["bf16"] = multiplies_bfloat16()
        for seed in options.seeds:
            try:
                homes[masking, seed] = runs.begin(Path(options.work) / f"{masking}-{seed}", config, resume=True)
            except (ValueError, OSError) as error:
                raise SystemExit(str(error)) from error
    return homes


def chosen_recipes(name: str, maskings: Iterable[str]) -> dict[str, Recipe]:
    """Ours, by masking; not each has all of them."""
    chosen = {}
    for masking in maskings:
        try:
            chosen[masking] = recipe_named(name, RECIPES[masking])
        except ValueError as error:
            raise SystemExit(f"--recipe for {masking} masking: {error}") from error
    return chosen


def earlier_rows(path: str) -> dict[tuple[str, int], dict[str, Any]]:
    """What `row` takes of each published training in a file of `--against`, by masking and seed."""
    taken = ("published_steps", "open_published")
    try:
        rows = runs.read_json(path)["rows"]
        return {(one["masking"], one["seed"]): {name: one[name] for name in taken} for one in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"--against {path}: {type(error).__name__} {error}; expected what --json of an earlier run wrote: "
            f"rows of masking, seed, {', '.join(taken)}"
        ) from error


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="a question-answering BERT")
    parser.add_argument("--data", required=True, help="SQuAD JSON to train on")
    parser.add_argument("--dev", required=True, help="SQuAD JSON to measure on")
    parser.add_argument("--masking", choices=("input", "hidden"), nargs="+", default=("input", "hidden"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--epochs", type=float, default=8.0, help="of the published recipe")
    parser.add_argument("--recipe", default="steady", help="ours, by its name among the tasks' recipes")
    parser.add_argument("--ours-epochs", type=float, help="instead of ours' own")
    parser.add_argument("--work", help="folder for the published trainings, which go on there when stopped")
    parser.add_argument("--against", help="rows of an earlier run, in whose place published is not trained")
    parser.add_argument("--limit", type=int, help="use only so many questions of each file")
    options = measure.options(str(__doc__), parser)
    if options.device != "cpu":
        raise SystemExit("only the CPU is timed yet: leave --device out")
    chosen = chosen_recipes(options.recipe, options.masking)
    earlier = earlier_rows(options.against) if options.against else {}
    lacking = [(m, s) for m in options.masking for s in options.seeds if options.against and (m, s) not in earlier]
    if lacking:
        raise SystemExit(f"--against {options.against} has no row for {lacking}: leave those out, or --against")
    homes = begun(options)
    model: Any = load_for(options.folder, "QuestionAnswering")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    train, dev = (
        fitting(encode(tokenizer, read_squad(path)[: options.limit], model)) for path in (options.data, options.dev)
    )
    rows = []
    for masking in options.masking:
        published, ours = RECIPES[masking]["published"], chosen[masking]
        recipes = {
            "published": replace(published, epochs=options.epochs),
            "ours": replace(ours, epochs=options.ours_epochs or ours.epochs),
        }
        for seed in options.seeds:
            known = earlier.get((masking, seed))
            found = row(
                model, train, dev, masking, tokenizer.mask_token_id, seed, recipes, known, homes.get((masking, seed))
            )
            rows.append(found | {"recipe": options.recipe, "threads": options.threads})
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
            measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
