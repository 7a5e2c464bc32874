from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_probe import a_probe

from diffmask_fast.attribution import Attributions
from diffmask_fast.data import Examples, encode
from diffmask_fast.probes import load_probe, save_probe
from diffmask_fast.tasks import squad
from diffmask_fast.training import backbone

QUESTIONS = [
    ("who was king ?", "the old king walked in münchen ."),
    ("where is the film ?", "a dull film in paris , the city of year 1"),
    ("what is red ?", "a red house , a blue bird"),
]
COLUMNS = {
    "kl", "open", "kept_prediction", "open_question", "open_passage", "sampled_kl", "sampled_open",
    "sampled_kept_prediction",
}  # fmt: skip


def as_squad(pairs: list[tuple[str, str]]) -> dict:
    paragraphs = [{"context": passage, "qas": [{"question": question, "id": "1"}]} for question, passage in pairs]
    return {"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(as_squad(QUESTIONS), ensure_ascii=False), encoding="utf-8")
    return path


def refused(tmp_path: Path, content: bytes | str | object, match: str) -> None:
    path = tmp_path / "broken.json"
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        squad.read_squad(path)
    assert str(path) in str(caught.value)


def test_questions_come_with_their_passages(questions: Path) -> None:
    assert squad.read_squad(questions) == QUESTIONS


def test_questions_lose_the_spaces_around_them_and_passages_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(as_squad([("  who? \n", " a  film ")])))
    assert squad.read_squad(path) == [("who?", " a  film ")]


@pytest.mark.parametrize("content", ["", "question,context\nwho?,me", '{"data": [', b"\xff\xfe\x00\x01"])
def test_a_file_that_is_no_json_is_refused(content: bytes | str, tmp_path: Path) -> None:
    refused(tmp_path, content, "is not JSON .*; expected a SQuAD file")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([], "data"),
        ("null", "data"),
        ({"rows": []}, "data"),
        ({"data": {"question": "who?"}}, r"data\[0\]"),
        ({"data": [{"paragraphs": None}]}, r"data\[0\]"),
        ({"data": [as_squad(QUESTIONS)["data"][0], {"title": "y"}]}, r"data\[1\]"),
        ({"data": [{"paragraphs": [{"context": "x", "qas": []}, {"qas": []}]}]}, r"data\[0\]\.paragraphs\[1\]"),
        ({"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1}]}]}]}, r"data\[0\]\.paragraphs\[0\]"),
        ({"data": [{"paragraphs": [{"context": "x", "qas": [{"question": 3}]}]}]}, r"data\[0\]\.paragraphs\[0\]"),
        ({"data": [{"paragraphs": [{"context": 3, "qas": [{"question": "who?"}]}]}]}, r"data\[0\]\.paragraphs\[0\]"),
    ],
)  # fmt: skip
def test_json_that_is_not_squad_is_refused_and_the_place_named(content: object, place: str, tmp_path: Path) -> None:
    refused(tmp_path, content, rf"is JSON but not SQuAD: at {place}: ")


@pytest.mark.parametrize("content", [{"data": []}, {"data": [{"paragraphs": []}]}])
def test_a_file_without_a_question_is_refused(content: dict, tmp_path: Path) -> None:
    refused(tmp_path, content, "holds no question")


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)  # as where it is not installed
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: there is no such file"):
        squad.read_squad(tmp_path / "nothing.json")


def test_a_folder_is_no_squad_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        squad.read_squad(tmp_path)


LONG = ("who is red ?", "the old king walked in münchen , " * 12 + "a red bird")


def test_questions_longer_than_the_model_takes_are_counted_with_their_windows(tokenizer: Any, tiny_bert: Any) -> None:
    model = tiny_bert("ForQuestionAnswering")
    assert squad.windowed(encode(tokenizer, QUESTIONS, model)) == (0, 0)
    examples = encode(tokenizer, [QUESTIONS[0], LONG, QUESTIONS[1], LONG, ("who ?", "film " * 29)], model)
    # 99 tokens of passage, 25 a window, of which 8 are shared: 25 and 17 more each time; and 29 where 27 have room
    assert squad.windowed(examples) == (3, 6 + 6 + 2)
    assert len(examples) == 2 + 14


def test_a_run_reads_long_questions_in_windows_and_says_so(
    qa_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    train, dev = tmp_path / "train.json", tmp_path / "dev.json"
    train.write_text(json.dumps(as_squad([*QUESTIONS, LONG])))
    dev.write_text(json.dumps(as_squad([LONG, QUESTIONS[0]])))
    metrics = squad.run(str(qa_folder), train, dev, tmp_path / "run", epochs=2.0, bf16=False)
    check_metrics(metrics, sites=4)
    assert metrics["questions"] == {"train": 4, "eval": 2, "windowed": [1, 1], "windows": [6, 6]}
    said = "in overlapping windows: training questions 1 (6 windows), evaluation questions 1 (6 windows)"
    assert said in capsys.readouterr().out
    attributions = Attributions.load(tmp_path / "run" / "attributions.safetensors")
    assert len(attributions) == 2 and len(attributions[0].tokens) == 106
    assert attributions[0].original in LONG[1]


@pytest.mark.parametrize("broken", ["train", "dev"])
def test_a_question_that_leaves_its_passage_no_room_is_named_with_its_file_before_any_training(
    broken: str, qa_folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(squad, "explain", None)
    path = tmp_path / f"{broken}.json"
    path.write_text(json.dumps(as_squad([QUESTIONS[0], ("who " * 29, "the old king"), QUESTIONS[1]])))
    files = (path, questions) if broken == "train" else (questions, path)
    with pytest.raises(ValueError, match=rf"{path}, questions counted from 0: text 1, \('who who .* has 35 tokens"):
        squad.run(str(qa_folder), *files, tmp_path / "run", epochs=1.0, bf16=False, quiet=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_run_reads_a_question_that_leaves_little_room_in_windows_that_share_less(
    qa_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(as_squad([QUESTIONS[0], ("who " * 25, "a red house")])))
    metrics = squad.run(str(qa_folder), path, path, tmp_path / "run", epochs=1.0, bf16=False)
    assert metrics["questions"] == {"train": 2, "eval": 2, "windowed": [0, 0], "windows": [0, 0]}
    path.write_text(json.dumps(as_squad([QUESTIONS[0], ("who " * 25, "a red house , a blue bird")])))
    metrics = squad.run(str(qa_folder), path, path, tmp_path / "other", epochs=1.0, bf16=False)
    # 7 tokens of passage, 4 a window of which 2 are shared
    assert metrics["questions"] == {"train": 2, "eval": 2, "windowed": [1, 1], "windows": [3, 3]}
    assert "training questions 1 (3 windows)" in capsys.readouterr().out


def check_metrics(metrics: dict, sites: int) -> None:
    assert len(metrics["sites"]) == sites and set(metrics) == {"sites", "overall", "questions", "seconds"}
    for row in (*metrics["sites"].values(), metrics["overall"]):
        assert set(row) == COLUMNS
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
        assert all(row[name] <= 1 for name in COLUMNS - {"kl", "sampled_kl"})


@pytest.mark.parametrize(
    ("recipe", "masking"),
    [("steady", "input"), ("decided", "input"), ("published", "input"), ("steady", "hidden")],
)
def test_a_run_goes_from_questions_to_a_report_and_a_finished_one_is_not_run_again(
    recipe: str, masking: str, questions: Path, qa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out, options = tmp_path / "run", {"recipe": recipe, "masking": masking, "epochs": 2.0, "bf16": False, "quiet": True}
    metrics = squad.run(str(qa_folder), questions, questions, out, **options)
    check_metrics(metrics, sites=4)
    assert metrics["questions"] == {"train": 3, "eval": 3, "windowed": [0, 0], "windows": [0, 0]}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    attributions, probe = (
        Attributions.load(out / "attributions.safetensors"),
        load_probe(out / "probe.safetensors"),
    )
    assert len(attributions) == 3 and attributions.masking == probe.masking == masking
    assert probe.sizes == (16,) * 4 and probe.meta["recipe"] == recipe and probe.meta["model"] == str(qa_folder)
    assert {path.name for path in out.iterdir()} >= {
        "report.html",
        "example.png",
        "by_site.png",
        "config.json",
    }
    monkeypatch.setattr(squad, "explain", None)  # what a second run would need
    assert squad.run(str(qa_folder), questions, questions, out, resume=True, **options) == metrics


def test_a_run_resumes_to_the_same_bits_after_it_stopped_behind_the_training(
    questions: Path, qa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 3.0, "bf16": False, "quiet": True}
    whole = squad.run(str(qa_folder), questions, questions, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(squad, "save_probe", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            squad.run(str(qa_folder), questions, questions, tmp_path / "stopped", **options)
    resumed = squad.run(str(qa_folder), questions, questions, tmp_path / "stopped", resume=True, **options)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    one, other = (load_probe(tmp_path / run / "probe.safetensors").state_dict() for run in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_on_a_model_that_is_not_there_leaves_the_folder_free(
    questions: Path, qa_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        squad.run(str(tmp_path / "nowhere"), questions, questions, out, quiet=True)
    squad.run(str(qa_folder), questions, questions, out, epochs=1.0, bf16=False, quiet=True)
    assert (out / "metrics.json").exists()


def test_a_run_may_use_bfloat16_for_the_frozen_model(questions: Path, qa_folder: Path, tmp_path: Path) -> None:
    metrics = squad.run(str(qa_folder), questions, questions, tmp_path / "run", epochs=1.0, bf16=True, quiet=True)
    check_metrics(metrics, sites=4)
    weights = load_probe(tmp_path / "run" / "probe.safetensors").state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("has", [False, True])
def test_a_run_uses_bfloat16_unasked_where_the_device_has_it(
    questions: Path, qa_folder: Path, tmp_path: Path, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffmask_fast.training import trainer

    class TrainedError(Exception):
        pass

    def train(*_: Any, bf16: bool, **__: Any) -> None:
        raise TrainedError(bf16)

    monkeypatch.setattr(squad, "multiplies_bfloat16", lambda: has)
    monkeypatch.setattr(trainer, "train_probe", train)
    with pytest.raises(TrainedError, match=str(has)):
        squad.run(str(qa_folder), questions, questions, tmp_path / "run", epochs=1.0, quiet=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["bf16"] is has


@pytest.mark.shared
@pytest.mark.slow
def test_a_run_on_real_questions_and_a_real_model_leaves_sound_metrics(shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "squad"
    metrics = squad.run(
        str(shared / "models" / "minilm-l6-squad"), data / "train.json", data / "dev.json", tmp_path / "run",
        limit=16, epochs=1.0, quiet=True,
    )  # fmt: skip
    check_metrics(metrics, sites=8)
    assert metrics["questions"]["train"] == metrics["questions"]["eval"] == 16
    attributions = Attributions.load(tmp_path / "run" / "attributions.safetensors")
    assert (attributions.keep[:, 1:] <= attributions.keep[:, :-1]).all()
    assert all(original != "(no span)" for original in attributions.original)


SHARED_OUT = """
import sys, torch
from dataclasses import replace
from diffmask_fast import explain, load_probe, processes
from diffmask_fast.data import encode
from diffmask_fast.models import load_for
from diffmask_fast.predictions import Own
from diffmask_fast.runs import write_json
from diffmask_fast.tasks.squad import read_squad
from diffmask_fast.training.evaluation import sampled_metrics
from transformers import AutoTokenizer
folder, questions, probe, out = sys.argv[1:]
torch.set_num_threads(1)
model = load_for(folder)
texts = encode(AutoTokenizer.from_pretrained(folder), read_squad(questions), model)
asked = model, load_probe(probe), texts
# of a kind whose functions can't be sent to another process
own = Own(lambda p, q: (p - q).square().sum(-1), lambda output, _: output.start_logits.amax(-1), lambda read: read > 0)
asked_otherwise = model, load_probe(probe), replace(texts, kind=own)
otherwise = explain(*asked_otherwise, batch_size=1)
alone = explain(*asked, batch_size=1), sampled_metrics(*asked, batch_size=1)
torch.distributed.init_process_group("gloo")
assert len(processes.share(texts.batches(1))) < len(texts.batches(1))
both = explain(*asked, batch_size=1, shared=True), sampled_metrics(*asked, batch_size=1, shared=True)
assert both[0].to_dict() == alone[0].to_dict() and both[1] == alone[1]
assert explain(*asked_otherwise, batch_size=1, shared=True).to_dict() == otherwise.to_dict()
if processes.is_first():
    write_json(out, len(both[0]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_leave_one_run(questions: Path, qa_folder: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run, script = tmp_path / "run", tmp_path / "script.py"
    options = ["--model", qa_folder, "--train", questions, "--eval", questions, "--out", run, "--epochs", "1"]
    program = Path(sys.executable).parent / "diffmask-fast"
    command = [*launch, "--no-python", program, "train", "squad", *map(str, options), "--no-bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    check_metrics(json.loads((run / "metrics.json").read_text()), sites=4)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    script.write_text(SHARED_OUT)
    arguments = [qa_folder, questions, run / "probe.safetensors", tmp_path / "texts.json"]
    done = subprocess.run(
        [*launch, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr
    texts = sum(len(p["qas"]) for a in json.loads(questions.read_text())["data"] for p in a["paragraphs"])
    assert json.loads((tmp_path / "texts.json").read_text()) == texts


EXPLAIN = """
import importlib, os, sys
from pathlib import Path
module = importlib.import_module("diffmask_fast.attribution.explain")
read, folder = module.explain_batch, Path(sys.argv.pop(1))
def noted(patched, probe, texts, numbers):
    with (folder / ("read" + os.environ.get("RANK", ""))).open("a") as file:
        print(*numbers, file=file)
    return read(patched, probe, texts, numbers)
module.explain_batch = noted
from diffmask_fast.cli import main
main()
"""


@pytest.mark.slow
def test_the_explain_command_shares_its_texts_out_among_processes_and_one_of_them_writes(
    qa_folder: Path, tmp_path: Path
) -> None:
    save_probe(a_probe(), tmp_path / "probe.safetensors")
    (tmp_path / "script.py").write_text(EXPLAIN)
    # more texts than a batch holds: each process reads some
    asked = [option for i in range(20) for option in ("--text", QUESTIONS[i % 3][0], "--passage", QUESTIONS[i % 3][1])]
    asked += ["--model", str(qa_folder), "--probe", str(tmp_path / "probe.safetensors")]
    found = []
    for name, launch in (
        ("alone", []),
        ("both", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        out = tmp_path / f"{name}.safetensors"
        done = subprocess.run(
            [sys.executable, *launch, str(tmp_path / "script.py"), str(tmp_path), "explain", "--out", str(out), *asked],
            capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved ") == 1
        found.append(Attributions.load(out).to_dict())
    assert found[0] == found[1]
    alone, first, second = ((tmp_path / f"read{rank}").read_text().split() for rank in ("", 0, 1))
    assert sorted(alone) == sorted(first + second) and first and second


def test_a_run_may_make_its_batches_by_tokens_and_resumes_with_the_same_budget_only(
    questions: Path, qa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    collate = Examples.collate
    monkeypatch.setattr(Examples, "collate", lambda self, batch: asked.append(len(batch)) or collate(self, batch))
    options = {"epochs": 1.0, "bf16": False, "quiet": True}
    with monkeypatch.context() as patched:
        patched.setattr(squad, "explain", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            squad.run(str(qa_folder), questions, questions, tmp_path / "run", tokens_per_batch=1, **options)
    # each alone; by the recipe all three would be one batch, as where the states are measured
    assert asked[-3:] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"another configuration: \{'tokens_per_batch': 1\}, now"):
        squad.run(str(qa_folder), questions, questions, tmp_path / "run", resume=True, **options)


def test_a_run_may_compile_the_layers(
    questions: Path, qa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    plain = backbone.torch.compile
    monkeypatch.setattr(
        backbone.torch, "compile", lambda f, **o: compiled.append(f) or plain(f, **{**o, "backend": "eager"})
    )
    squad.run(str(qa_folder), questions, questions, tmp_path / "run", epochs=1.0, bf16=False, compile=True, quiet=True)
    assert len(compiled) == 2  # the model's layers
