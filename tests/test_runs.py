from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffmask_fast import runs
from diffmask_fast.attribution import Attributions

CONFIG = {"task": "toy", "seed": 0, "bound": None, "sizes": (1, 2)}


def begun(folder: Path) -> Path:
    """A run that left more than its configuration."""
    path = runs.begin(folder, CONFIG, resume=False)
    (path / "checkpoints").mkdir()
    return path


def test_a_run_leaves_its_configuration_and_the_versions(tmp_path: Path) -> None:
    path = runs.begin(tmp_path / "deep" / "run", CONFIG, resume=False)
    left = json.loads((path / runs.CONFIG).read_text())
    assert left["run"] == {**CONFIG, "sizes": [1, 2]}
    assert left["versions"]["torch"] == torch.__version__


def test_a_folder_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds another run: choose another folder, or go on with it by --resume"):
        runs.begin(tmp_path / "run", CONFIG, resume=False)


def test_a_folder_that_holds_something_else_is_refused_also_to_resume(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="is not empty and holds no run"):
            runs.begin(tmp_path, CONFIG, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_resumes_with_the_same_configuration_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    before = (path / runs.CONFIG).read_bytes()
    assert runs.begin(path, CONFIG, resume=True) == path
    assert (path / runs.CONFIG).read_bytes() == before


def test_resuming_with_another_configuration_names_what_changed(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration: \{'seed': 0\}, now \{'seed': 1\}"):
        runs.begin(tmp_path / "run", {**CONFIG, "seed": 1}, resume=True)


def test_resuming_where_nothing_is_begins_a_run(tmp_path: Path) -> None:
    assert (runs.begin(tmp_path / "run", CONFIG, resume=True) / runs.CONFIG).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_got_no_further_than_its_configuration_may_begin_again(resume: bool, tmp_path: Path) -> None:
    runs.begin(tmp_path / "run", CONFIG, resume=False)
    runs.begin(tmp_path / "run", {**CONFIG, "seed": 1}, resume)
    assert runs.read_json(tmp_path / "run" / runs.CONFIG)["run"]["seed"] == 1


@pytest.mark.parametrize("content", ["", "{", '{"run": {"task": "to', "[]", '{"run": []}', "{}"])
def test_a_damaged_configuration_is_one_error(content: str, tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    (path / runs.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        runs.begin(path, CONFIG, resume=True)


def test_a_configuration_that_is_being_written_is_not_another_run(tmp_path: Path) -> None:
    (tmp_path / f".0123456789ab.{runs.CONFIG}").touch()
    assert (runs.begin(tmp_path, CONFIG, resume=False) / runs.CONFIG).exists()


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "a.json", {"name": "münchen"})
    for bad in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            runs.write_json(tmp_path / "a.json", {"value": bad})
    assert runs.read_json(tmp_path / "a.json") == {"name": "münchen"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_finished_run_leaves_all_that_it_promises(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    attributions = Attributions(
        tokens=[["a", "b"]],
        site_names=("embedding", "last"),
        keep=torch.tensor([[1.0, 0.5], [0.9, 0.1]]),
        segments=torch.ones(2, dtype=torch.int8),
        divergence=torch.zeros(1, 2),
        original=["yes"],
        masked=[["yes", "yes"]],
        kept_prediction=torch.ones(1, 2, dtype=torch.bool),
    )
    runs.finish(tmp_path, {"seconds": 1.0}, attributions, "A <title>")
    assert {path.name for path in tmp_path.iterdir()} == {
        "attributions.safetensors",
        "report.html",
        "example.png",
        "by_site.png",
        "metrics.json",
    }
    assert Attributions.load(tmp_path / "attributions.safetensors").tokens == [["a", "b"]]
    assert runs.read_json(tmp_path / runs.METRICS) == {"seconds": 1.0}
