from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffmask_fast.reproduce import parts, squad, sst
from diffmask_fast.reproduce import toy as toy_experiment
from diffmask_fast.tasks import toy

pytest.importorskip("matplotlib")
pytest.importorskip("captum")

QUESTIONS = [
    ("who was king ?", "the old king walked in paris .", "the old king"),
    ("where is the film ?", "a dull film in paris , the city of year 1", "paris"),
]
TREES = [
    "(4 (2 a) (4 (3 fine) (2 film)))",
    "(0 (2 the) (0 (0 dull) (2 cat)))",
    "(2 (2 a) (2 (2 red) (2 house)))",
    "(3 (3 new) (2 city))",
]


def no_figure_is_missing(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures and figures == {path.stem for path in (folder / "figures").glob("*.pdf")}
    assert page.count('src="data:image/png;base64,') == len(figures)
    tables = list((folder / "tables").glob("*.csv"))
    assert page.count("<table>") == len(tables) == len(list((folder / "tables").glob("*.md")))
    for path in tables:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1


@pytest.fixture
def small_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "EXAMPLES", 300)
    monkeypatch.setattr(toy, "VALIDATION", 20)
    monkeypatch.setitem(toy.RECIPES, "steady", replace(toy.RECIPES["steady"], epochs=1.0))
    monkeypatch.setattr(toy_experiment, "METHODS_HERE", ["leave-one-out", "erasure"])


def test_the_toy_experiment_compares_every_method_and_is_not_made_twice(
    small_toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = toy_experiment.run(tmp_path / "toy", quick=True, quiet=True)
    assert list(metrics) == ["0"] and set(metrics["0"]) == {
        *("leave-one-out", "erasure", "diffmask"),
        *("diffmask, one multiplier for all sites", "diffmask-per-example, fixed baseline"),
    }
    # the probe with a multiplier for each site is another one
    assert metrics["0"]["diffmask"] != metrics["0"]["diffmask, one multiplier for all sites"]
    no_figure_is_missing(tmp_path / "toy")
    monkeypatch.setattr(toy, "run", None)  # what a second time would need
    monkeypatch.setattr(toy, "explained", None)
    assert toy_experiment.run(tmp_path / "toy", quick=True, quiet=True) == metrics


def test_a_distance_that_is_infinite_stays_so_in_the_table() -> None:
    seeds = {"0": {"a": {"hidden": {"kl": None, "js": 0.2}}, "b": {"hidden": {"kl": 1.0, "js": 0.1}}}}
    table = toy_experiment.distance_table("hidden", seeds)
    assert [row[0] for row in table.rows] == ["b", "a"] and table.rows[1][1] == float("inf")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    paragraphs = [
        {
            "context": passage,
            "qas": [{"question": asked, "id": "1", "answers": [{"text": gold, "answer_start": passage.index(gold)}]}],
        }
        for asked, passage, gold in QUESTIONS
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}))
    return str(path)


@pytest.fixture
def tagger(monkeypatch: pytest.MonkeyPatch) -> None:
    spacy = pytest.importorskip("spacy")
    words = pytest.importorskip("diffmask_fast.analysis.words")
    if not any(spacy.util.is_package(name) for name in words.TAGGERS):
        pytest.skip("none of spaCy's small English pipelines is installed")


def test_the_squad_experiment_goes_from_questions_to_a_page(
    questions: str, qa_folder: Path, tagger: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: {"steps": 3} for name in ("schulz", "guan", "integrated-gradients")}
    monkeypatch.setitem(squad.STEPS, True, few)
    results = squad.run(str(qa_folder), questions, questions, tmp_path / "squad", quick=True, quiet=True)
    assert set(results) == {"input", "hidden", "methods", "faithfulness"}
    assert set(results["methods"]) == set(parts.BY_TEXT)
    no_figure_is_missing(tmp_path / "squad")
    assert squad.run(str(qa_folder), questions, questions, tmp_path / "squad", quick=True, quiet=True) == results


def test_the_sst_experiment_goes_from_an_encoder_to_a_page(
    tiny_bert: Callable[..., Any], tokenizer: Any, tagger: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert("Model").save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    trees = tmp_path / "trees.txt"
    trees.write_text("\n".join(TREES) + "\n")
    small = {"limit": None, "fine_tune_epochs": 1.0, "epochs": 1.0, "explained": 3, "searched": 2}
    monkeypatch.setitem(sst.SIZES, True, small)
    results = sst.run(str(tmp_path / "encoder"), str(trees), str(trees), tmp_path / "sst", quick=True, quiet=True)
    assert set(results) == {"encoder", "gru", "again", "methods", "faithfulness", "search"}
    found = results["search"]["methods"]
    assert set(found) == set(sst.SEARCHES) and found["erasure"]["optimal"] == 1 and found["erasure"]["excess"] == 0
    no_figure_is_missing(tmp_path / "sst")


def test_files_that_are_wrong_are_refused_before_anything_is_made(
    qa_folder: Path, questions: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        squad.run(str(tmp_path / "nowhere"), questions, questions, tmp_path / "out", quiet=True)
    with pytest.raises(FileNotFoundError):
        squad.run(str(qa_folder), "nowhere.json", "nowhere.json", tmp_path / "out", quiet=True)
    with pytest.raises(FileNotFoundError):
        sst.run(str(qa_folder), "nowhere.txt", "nowhere.txt", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
