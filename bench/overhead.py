"""What of a real training's step is neither backbone nor gates: `python bench/train_step.py --overhead` runs it.

A training by `train_probe` of two epochs over few examples; its parts are timed where they are called. The first epoch
computes the original predictions, the second one remembers them. Writing a checkpoint, every 200 steps by default, is
timed for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch as replaced

from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from diffmask_fast.data import Examples
from diffmask_fast.probes import Probe
from diffmask_fast.sites import Patched
from diffmask_fast.tasks.squad import RECIPES
from diffmask_fast.training import objective, trainer
from diffmask_fast.training.backbone import multiplies_bfloat16
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.trainer import fresh_probe, train_probe

WARM_UP = 3  # steps of the first epoch that are not counted


class Clock(TrainerCallback):
    """Seconds by part, of each step. What is called within its own part is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def timed(self, part: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if part in self.open:
                return call(*args, **kwargs)
            start = time.perf_counter()
            self.open.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.open.remove(part)
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return run

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """So that a step whose optimiser is not wrapped would show."""
        assert "optimiser" in self.seconds

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.steps.append({**self.seconds, "whole": now - self.last})
        self.last, self.seconds = now, {}

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.last = self.last or time.perf_counter()


@contextmanager
def listening(callback: TrainerCallback) -> Iterator[None]:
    """While open, every training calls this too."""
    init = trainer.ProbeTrainer.__init__

    def with_callback(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(callback)

    with replaced.object(trainer.ProbeTrainer, "__init__", with_callback):
        yield


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """While open, the parts of every training are timed by the clock."""
    parts = [
        ("backbone and gates", Patched, "run"),
        ("backbone and gates", Probe, "logits"),
        ("backbone and gates", objective, "gate_mix"),
        ("backward", Accelerator, "backward"),
        ("objective", Objective, "forward"),
        ("checkpoint", Trainer, "_save_checkpoint"),
    ]
    with ExitStack() as stack:
        stack.enter_context(listening(clock))
        for part, owner, name in parts:
            stack.enter_context(replaced.object(owner, name, clock.timed(part, getattr(owner, name))))
        make = trainer.optimizer_for

        def optimizer_for(of: Objective) -> Any:
            made = make(of)
            made.step = clock.timed("optimiser", made.step)
            return made

        stack.enter_context(replaced.object(trainer, "optimizer_for", optimizer_for))
        yield


def rows_of(model: Any, examples: Examples, masking: str, name: str, rounds: int, folder: str) -> list[dict]:
    """One row for the first epoch and one for the second, of `rounds` steps each."""
    recipe = RECIPES[masking]["steady"]
    recipe = replace(recipe, epochs=2.0)
    chosen = examples.select(range(0, len(examples), max(1, len(examples) // (rounds * recipe.batch_size))))
    chosen = chosen.select(range(min(len(chosen), rounds * recipe.batch_size)))
    probe = fresh_probe(model, chosen, recipe, masking)
    clock = Clock()
    with watched(clock):
        train_probe(model, probe, chosen, recipe, f"{folder}/{masking}", bf16=multiplies_bfloat16(), quiet=True)
    half = len(clock.steps) // 2
    epochs = {"first": clock.steps[WARM_UP:half], "later": clock.steps[half + 1 :]}  # the next epoch's order is drawn
    return [row(name, masking, epoch, steps, clock.seconds["checkpoint"]) for epoch, steps in epochs.items()]


def row(name: str, masking: str, epoch: str, steps: list[dict[str, float]], checkpoint: float) -> dict[str, Any]:
    total = {part: sum(step[part] for step in steps) for part in steps[0]}
    inner = total["objective"] - total["backbone and gates"]
    outer = total["whole"] - total["objective"] - total["backward"] - total["optimiser"]
    shares = {"objective": inner, "optimiser": total["optimiser"], "trainer": outer}
    return {
        "model": name,
        "masking": masking,
        "epoch": epoch,
        "steps": len(steps),
        "seconds": round(total["whole"] / len(steps), 4),
        **{f"{part}_share": round(seconds / total["whole"], 4) for part, seconds in shares.items()},
        "overhead": round(sum(shares.values()) / total["whole"], 4),
        "checkpoint_seconds": round(checkpoint, 3),
    }
