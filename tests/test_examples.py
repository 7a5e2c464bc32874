"""The examples run as they stand and find what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
