"""A run's folder: `config.json` when it starts, then checkpoints, and at the end `metrics.json`, probe and pictures."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffmask_fast.attribution import Attributions
from diffmask_fast.files import replacing

CONFIG, METRICS = "config.json", "metrics.json"


def begin(folder: str | os.PathLike[str], config: dict[str, Any], resume: bool) -> Path:
    """Make the folder of a run and write its exact configuration into it.

    A folder that holds a configuration and nothing else is of a run that never got anywhere, because a file that it
    was given is missing for instance: it may begin again, with any options.

    Raises:
        FileExistsError: the folder holds something else, or a run and `resume` is off.
        ValueError: `resume` with another configuration than the run began with.
    """
    path = Path(folder)
    config = json.loads(json.dumps(config))
    more = path.exists() and any(not _is_config(other.name) for other in path.iterdir())
    if more and (path / CONFIG).exists():
        if not resume:
            raise FileExistsError(f"{path} holds another run: choose another folder, or go on with it by --resume")
        began = read_json(path / CONFIG)
        run = began.get("run") if isinstance(began, dict) else None
        if not isinstance(run, dict):
            raise ValueError(f"{path / CONFIG} is damaged: it holds no configuration of a run")
        changed = [key for key in config if run.get(key) != config[key]]
        if changed:
            was = {key: run.get(key) for key in changed}
            raise ValueError(
                f"{path} was begun with another configuration: {was}, now { {k: config[k] for k in changed} }; "
                "resume with the same options, or choose another folder"
            )
        return path
    if more:
        raise FileExistsError(f"{path} is not empty and holds no run: choose another folder")
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG, {"run": config, "versions": versions()})
    return path


def _is_config(name: str) -> bool:
    """Also where it is being written: by another process of the same run, or by one that was killed meanwhile."""
    return name == CONFIG or (name.startswith(".") and name.endswith(f".{CONFIG}"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in (
        "diffmask_fast",
        "transformers",
        "accelerate",
        "pytorch_optimizer",
        "safetensors",
        "tokenizers",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def finish(folder: Path, metrics: dict[str, Any], attributions: Attributions, title: str, example: int = 0) -> None:
    """Leave what a finished run leaves: attributions, page, pictures and, last, the metrics that mark it finished."""
    from diffmask_fast.report import figure, html

    attributions.save(folder / "attributions.safetensors")
    html.write(attributions, folder / "report.html", title=title)
    figure.heatmap(attributions[example], folder / "example.png")
    figure.by_site(attributions, folder / "by_site.png")
    write_json(folder / METRICS, metrics)
