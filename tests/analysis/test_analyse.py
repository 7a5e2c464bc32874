from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from token_lists import pair, single

pytest.importorskip("typer")

from tiny_probe import a_probe
from typer.testing import CliRunner

from diffmask_fast.analysis import analyse as module
from diffmask_fast.analysis.analyse import analyse
from diffmask_fast.attribution.explain import explain
from diffmask_fast.cli import app
from diffmask_fast.data import encode
from diffmask_fast.models import load_for
from diffmask_fast.tasks.squad import read_squad

CONTEXT = "the old king walked in paris . a red house"
QUESTIONS = [("who walked ?", "the old king", 0), ("what is red ?", "a red house", 31)]


class Tagger:
    def pipe(self, texts: list[str]) -> Any:
        for text in texts:
            words = [SimpleNamespace(text=m.group(), idx=m.start(), pos_="NOUN") for m in re.finditer(r"\S+", text)]
            yield type("Document", (list,), {"text": text})(words)


@pytest.fixture(autouse=True)
def a_tagger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_tagger", Tagger)


@pytest.fixture
def squad_file(tmp_path: Path) -> Path:
    qas = [{"question": q, "answers": [{"text": text, "answer_start": at}]} for q, text, at in QUESTIONS]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return path


def names(findings: list) -> list[str]:
    return [finding.table.name for finding in findings]


def test_single_texts_are_analysed_without_a_model(make: Any) -> None:
    found = analyse([make([single("a fine film"), single("dull")])])
    assert names(found) == ["part-of-speech", "segments", "segments-expected", "first-token"]
    groups = {row[0]: row[1:3] for row in found[0].table.rows}
    assert groups == {"NOUN": (4, 2), "[CLS]": (2, 2), "[SEP]": (2, 2)}


def test_pairs_are_analysed_by_segment_and_several_runs_compared(make: Any) -> None:
    texts = [pair("who", "old king"), pair("what is", "red")]
    hidden = make(texts, masking="hidden", method="integrated-gradients")
    found = names(analyse([make(texts, seed=0), make(texts, seed=1), hidden]))
    own = ["part-of-speech", "part-of-speech-question", "part-of-speech-passage", "segments", "segments-expected"]
    wanted = [f"{name}-{i}" for i in range(3) for name in (*own, "first-token")]
    assert found == [*wanted, "agreement"]


def test_texts_without_a_tokenizer_and_answers_without_texts_are_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="texts and tokenizer belong together"):
        analyse([make([single("a")])], ["a"])
    with pytest.raises(TypeError, match="give texts and tokenizer too"):
        analyse([make([single("a")])], answers=[[]])
    with pytest.raises(ValueError, match="give at least one"):
        analyse([])


def test_the_command_leaves_tables_and_figures_of_questions(
    qa_folder: Path, tokenizer: Any, squad_file: Path, tmp_path: Path
) -> None:
    model = load_for(str(qa_folder))
    result = explain(model, a_probe(), encode(tokenizer, read_squad(squad_file), model))
    saved = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in saved:
        result.save(path)
    out = tmp_path / "out"
    given = [*map(str, saved), "--out", str(out), "--squad", str(squad_file), "--model", str(qa_folder)]
    done = CliRunner().invoke(app, ["analyse", *given, "--faithful", "embedding"], catch_exceptions=False)
    assert done.exit_code == 0 and str(out) in done.output.replace("\n", "")
    tables = {path.name for path in (out / "tables").iterdir()}
    for name in ("scores-0", "part-of-speech-passage-1", "segments-0", "first-token-1", "agreement", "faithfulness"):
        assert {f"{name}.md", f"{name}.csv"} <= tables
    figures = {path.name for path in (out / "figures").iterdir()}
    for name in ("part-of-speech-0", "segments-1", "agreement", "faithfulness-kept", "faithfulness-kl"):
        assert {f"{name}.png", f"{name}.pdf"} <= figures
    header = (out / "tables" / "segments-0.csv").read_text().splitlines()[0]
    assert "answer (2)" in header and "passage (2)" in header
    assert len(json.loads((out / "faithfulness.json").read_text())["lines"]) == 3


def test_the_command_says_what_belongs_together(make: Any, tmp_path: Path) -> None:
    make([single("a")]).save(tmp_path / "a.safetensors")
    for options in (["--squad", "x.json"], ["--model", "x"], ["--faithful", "last"]):
        given = ["analyse", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out"), *options]
        with pytest.raises(ValueError, match="belong together"):
            CliRunner().invoke(app, given, catch_exceptions=False)
