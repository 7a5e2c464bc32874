"""The command line as a user meets it: in a process of its own where the exit and the streams matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from diffmask_fast.attribution import Attributions
from diffmask_fast.cli import app, main
from diffmask_fast.ops import backends
from diffmask_fast.probes import Probe, save_probe
from diffmask_fast.tasks import toy

runner = CliRunner()
QUESTION = {"data": [{"paragraphs": [{"context": "the old king walked .", "qas": [{"question": "who ?"}]}]}]}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from diffmask_fast.cli import main; main()"
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, **offline},
    )  # fmt: skip


def failed_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The error that the command line leaves for these arguments; the test fails unless it is one line."""
    monkeypatch.setattr(sys, "argv", ["diffmask-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 1
    assert "Traceback" not in said.err + said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n")
    return errors[0]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "questions.json").write_text(json.dumps(QUESTION))
    return tmp_path / "questions.json"


@pytest.fixture
def probe_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_probe(Probe([16] * 4, "input", bias=0.5), tmp_path / "probe.safetensors")
    return tmp_path / "probe.safetensors"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["train", "explain", "show", "doctor"]),
        (["train"], ["toy", "squad", "sst"]),
        (["train", "toy"], ["--out", "--seed", "--recipe", "steady", "published", "--resume"]),
        (
            ["train", "squad"],
            ["--model", "--train", "--eval", "--out", "--bf16", "--limit", "--epochs", "--resume"],
        ),
        (["train", "squad"], ["--compile", "--checkpoint-layers", "--tokens-per-batch"]),
        (
            ["train", "sst"],
            ["--model", "--train", "--eval", "--architecture", "--classes", "--masking", "--fine-tune-epochs"],
        ),
        (["explain"], ["--model", "--probe", "--out", "--text", "--passage"]),
        (["show"], ["--index", "--site", "--figure", "--html"]),
    ],
)
def test_help_names_the_commands_and_options(arguments: list[str], named: list[str]) -> None:
    result = runner.invoke(app, [*arguments, "--help"], env={"NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert all(name in result.output for name in named)


def test_doctor_finds_a_sound_installation_and_names_each_backend() -> None:
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert all(f"backend {name}" in done.stdout for name in backends.BACKENDS)
    assert "Traceback" not in done.stderr


def test_doctor_fails_where_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffmask_fast.doctor.report", lambda: False)
    assert runner.invoke(app, ["doctor"]).exit_code == 1


def test_an_error_is_one_line_on_stderr_and_exit_code_one(tmp_path: Path) -> None:
    done = run("show", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_a_folder_without_a_run_has_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "attributions.safetensors" in failed_in_one_line(capsys, monkeypatch, "show", tmp_path)


def test_an_output_folder_that_holds_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"run": {}}')
    (tmp_path / "run" / "model.safetensors").touch()
    error = failed_in_one_line(capsys, monkeypatch, "train", "toy", "--out", tmp_path / "run")
    assert "holds another run: choose another folder, or go on with it by --resume" in error


def test_an_output_folder_that_is_a_file_is_refused(
    questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "questions.json" in failed_in_one_line(capsys, monkeypatch, "train", "toy", "--out", questions)


def test_a_run_that_resumes_with_another_seed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"task": "toy", "seed": 0, "recipe": "steady", **toy.RECIPES["steady"].to_dict()}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"run": config}))
    error = failed_in_one_line(capsys, monkeypatch, "train", "toy", "--out", tmp_path / "run", "--resume", "--seed", 1)
    assert "another configuration: {'seed': 0}, now {'seed': 1}" in error


def test_a_file_that_is_not_trees_is_refused_and_leaves_no_folder(
    qa_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trees.txt").write_text("(4 (2 a) (4 film))\n(4 film\n")
    files = ["--train", tmp_path / "trees.txt", "--eval", tmp_path / "trees.txt"]
    options = ["--model", qa_folder, *files, "--out", tmp_path / "run"]
    error = failed_in_one_line(capsys, monkeypatch, "train", "sst", *options)
    assert "trees.txt, line 2: it ends with 1 open bracket" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "said"), [("[1]", "is JSON but not SQuAD: at data"), ("who?", "is not JSON")])
def test_a_file_that_is_not_squad_is_refused_and_leaves_no_folder(
    content: str, said: str, qa_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "broken.json").write_text(content)
    files = ["--train", tmp_path / "broken.json", "--eval", tmp_path / "broken.json"]
    error = failed_in_one_line(
        capsys, monkeypatch, "train", "squad", "--model", qa_folder, *files, "--out", tmp_path / "run"
    )
    assert said in error
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_folder_is_refused(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--train", questions, "--eval", questions, "--out", tmp_path / "run"]
    error = failed_in_one_line(capsys, monkeypatch, "train", "squad", "--model", tmp_path / "no-model", *files)
    assert "no-model: there is no such folder" in error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", ""], "text 0 is empty: leave it out"),
        (["--text", "who ?", "--passage", " "], "text 0 is empty: leave it out"),
        (["--text", "film " * 40, "--passage", "a cat"], "has 45 tokens and the model takes 32, and 43 of them"),
        (
            ["--text", "a", "--text", "b", "--passage", "c"],
            "2 --text and 1 --passage: give one passage for each text",
        ),
    ],
)
def test_texts_that_cannot_be_explained_are_refused(
    more: list[str], said: str, qa_folder: Path, probe_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "a.safetensors"
    common = ["explain", "--model", qa_folder, "--probe", probe_file, "--out", out]
    assert said in failed_in_one_line(capsys, monkeypatch, *common, *more)
    assert not out.exists()


@pytest.mark.parametrize("which", ["missing", "foreign"])
def test_a_probe_that_is_none_is_refused(
    which: str,
    qa_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "missing.safetensors" if which == "missing" else qa_folder / "model.safetensors"
    arguments = [
        "--model",
        qa_folder,
        "--probe",
        path,
        "--out",
        tmp_path / "a.safetensors",
        "--text",
        "a film",
    ]
    error = failed_in_one_line(capsys, monkeypatch, "explain", *arguments)
    assert str(path) in error


def test_texts_are_explained_saved_and_shown(qa_folder: Path, probe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    texts = [
        "--text",
        "who was king ?",
        "--passage",
        "the old king walked .",
        "--text",
        "what ?",
        "--passage",
        "a cat",
    ]
    explained = runner.invoke(
        app, ["explain", "--model", str(qa_folder), "--probe", str(probe_file), "--out", str(out), *texts]
    )
    assert explained.exit_code == 0, explained.exception
    assert "king" in explained.output and f"diffmask-fast show {out}" in explained.output.replace("\n", "")
    saved = Attributions.load(out)
    assert len(saved) == 2 and saved.segments.max() == 2
    summary = runner.invoke(app, ["show", str(out)])
    one = runner.invoke(app, ["show", str(out), "--index", "1", "--site", "2"])
    assert summary.exit_code == one.exit_code == 0
    assert "embedding" in summary.output and "cat" in one.output


def test_a_text_longer_than_the_model_takes_is_explained_and_shown_whole(
    qa_folder: Path, probe_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "a.safetensors", tmp_path / "a.png"
    common = ["explain", "--model", str(qa_folder), "--probe", str(probe_file), "--out", str(out)]
    explained = runner.invoke(app, [*common, "--text", "who ?", "--passage", "film " * 70 + "queen"])
    assert explained.exit_code == 0, explained.exception
    assert "queen" in explained.output
    (one,) = Attributions.load(out)
    assert one.tokens == ["[CLS]", "who", "?", "[SEP]", *["film"] * 70, "queen", "[SEP]"]
    shown = runner.invoke(app, ["show", str(out), "--index", "0", "--figure", str(figure)])
    assert shown.exit_code == 0 and "queen" in shown.output and figure.exists()


def test_show_writes_a_picture_and_a_page(qa_folder: Path, probe_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, figure, page = (tmp_path / name for name in ("a.safetensors", "a.png", "a.html"))
    common = ["explain", "--model", str(qa_folder), "--probe", str(probe_file), "--out", str(out)]
    assert runner.invoke(app, [*common, "--text", "a film"]).exit_code == 0
    shown = runner.invoke(app, ["show", str(out), "--index", "0", "--figure", str(figure), "--html", str(page)])
    assert shown.exit_code == 0, shown.exception
    assert figure.read_bytes().startswith(b"\x89PNG") and "<html" in page.read_text()


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--index", 5, "text 5 does not exist"), ("--site", 9, "site 9")]
)
def test_a_text_or_site_that_is_not_there_is_refused(
    option: str, value: int, said: str, qa_folder: Path, probe_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "a.safetensors"
    common = ["explain", "--model", str(qa_folder), "--probe", str(probe_file), "--out", str(out)]
    assert runner.invoke(app, [*common, "--text", "a film"]).exit_code == 0
    chosen = [option, value] if option == "--index" else ["--index", 0, option, value]
    assert said in failed_in_one_line(capsys, monkeypatch, "show", out, *chosen)


def test_squad_is_trained_from_the_command_line(questions: Path, qa_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--model",
        qa_folder,
        "--train",
        questions,
        "--eval",
        questions,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
    ]
    result = runner.invoke(app, ["train", "squad", *map(str, options), "--no-bf16"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    assert "sampled_kl" in result.output and "report.html" in result.output
    again = runner.invoke(app, ["train", "squad", *map(str, options), "--no-bf16", "--resume"], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.exception


def test_toy_is_trained_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {
        "task_accuracy": 0.99,
        "seconds": 1.0,
        "sites": {"embedding": {"kl": 0.1, "js": 0.2, "open": 0.9}},
    }
    asked = []
    monkeypatch.setattr(toy, "run", lambda out, **options: asked.append((out, options)) or metrics)
    result = runner.invoke(app, ["train", "toy", "--out", str(tmp_path), "--seed", "4", "--recipe", "published"])
    assert result.exit_code == 0, result.exception
    assert asked == [(tmp_path, {"seed": 4, "recipe": "published", "resume": False})]
    assert "0.9900" in result.output and "embedding" in result.output
