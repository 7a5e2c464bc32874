"""The examples run as they stand and find what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reader import Reader, read_examples

from diffmask_fast import Probe, explain

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert all(f'run("{path.name}"' in tested for path in EXAMPLES.glob("*.py"))
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.ipynb"))


def test_a_hugging_face_model_in_three_lines(classifier: Any, tokenizer: Any, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lines = run("hugging_face.py", str(tmp_path), "a fine film").splitlines()
    assert [line.split()[0] for line in lines] == ["[CLS]", "a", "fine", "film", "[SEP]"]


def test_a_hugging_face_model_without_a_text_gets_one_line() -> None:
    command = [sys.executable, str(EXAMPLES / "hugging_face.py"), "folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "MODEL TEXT" in done.stderr


def test_published_gates() -> None:
    pytest.importorskip("transformers")
    assert "of the gates open" in run("published_gates.py")


def test_a_loop_of_ones_own_keeps_what_the_model_reads() -> None:
    assert run("own_loop.py").strip().endswith("kept: [0, 1, 2]")


def test_a_causal_language_model(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    words = "the old king of a new city walks to his house by the river and sees one blue bird".split()
    lines = [" ".join(words[i] for i in torch.randint(len(words), (20,), generator=generator)) for _ in range(150)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    found = run("causal_lm.py", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--quick")
    assert " prompts that neither model nor probe has seen" in found
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"prompt.png", "by_site.png", "report.html", "attributions.safetensors", "probe.safetensors"} <= written


def test_a_notebook_shows_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    result = explain(Reader(), Probe([8], "hidden"), read_examples())
    result.save(tmp_path / "attributions.safetensors")
    monkeypatch.setenv("RUN", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "view.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown[0]["text"] == "12 texts, sites: embedding\n"
    assert shown[1]["data"]["text/html"].startswith("<div><iframe srcdoc=")
    assert all("image/png" in output["data"] for output in shown[2:]) and len(shown) == 4
