"""An experiment as a row of stages: each leaves its result on disk, so that the whole goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn

from diffmask_fast.runs import read_json, write_json

Results = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of an experiment.

    Attributes:
        name: of the file that its result is kept in.
        what: the same in words.
        minutes: about how long it takes on two cores; only the time left is told by it.
        work: from the results of the stages before to its own, which has to be JSON. What else it leaves on disk it
            must be able to find again half-way.
    """

    name: str
    what: str
    minutes: float
    work: Callable[[Results], Any]


def run_stages(folder: Path, stages: Sequence[Stage], quiet: bool = False) -> Results:
    """Run what is not done yet, and return the results of all stages by name.

    A result is written whole when its stage ends, to `folder/stages/NAME.json`; to have a stage run again, remove
    that file.

    Raises:
        ValueError: a result on disk is damaged.
    """
    kept = folder / "stages"
    kept.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for stage in stages:
        if (kept / f"{stage.name}.json").exists():
            results[stage.name] = read_json(kept / f"{stage.name}.json")["result"]
    missing = [stage for stage in stages if stage.name not in results]
    with _Bar(missing, quiet) as bar:
        for stage in missing:
            seconds = bar.begin(stage)
            result = stage.work(results)
            write_json(kept / f"{stage.name}.json", {"seconds": round(seconds(), 1), "result": result})
            # as it will be read when the experiment goes on
            results[stage.name] = read_json(kept / f"{stage.name}.json")["result"]
            bar.end(stage, seconds())
    return {stage.name: results[stage.name] for stage in stages}


class _Bar(Progress):
    """One bar over all stages. It moves on while a stage runs, as fast as the stages before were against their
    estimates, and waits short of the stage's end if that comes later."""

    def __init__(self, stages: Iterable[Stage], quiet: bool) -> None:
        self.total = sum(stage.minutes for stage in stages)
        self.done = 0.0  # minutes by estimate
        self.spent = 0.0  # minutes
        self.running: tuple[Stage, float] | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(stderr=True),
            disable=quiet,
        )
        self.add_task("", total=self.total, left="")

    def begin(self, stage: Stage) -> Callable[[], float]:
        """A clock of the seconds since."""
        start = time.monotonic()
        self.running = (stage, start)
        return lambda: time.monotonic() - start

    def end(self, stage: Stage, seconds: float) -> None:
        self.done += stage.minutes
        self.spent += seconds / 60
        self.running = None
        self.console.print(f"{stage.what}: {in_words(seconds)}", highlight=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        pace = self.spent / self.done if self.done else 1.0
        done, what = self.done, "done"
        if self.running is not None:
            stage, start = self.running
            what = stage.what
            done += min((time.monotonic() - start) / 60 / pace, 0.95 * stage.minutes)
        left = f"about {in_words((self.total - done) * pace * 60)} left" if self.running else ""
        for task in self.task_ids:
            self.update(task, completed=done, description=what, left=left)
        yield from super().get_renderables()


def in_words(seconds: float) -> str:
    """Seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
