from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmask_fast.attribution import Attributions
from diffmask_fast.models import load_for
from diffmask_fast.probes import load_probe
from diffmask_fast.tasks import sst
from diffmask_fast.tasks.classifiers import FineTuning, classification_metrics, fine_tune

TREES = [
    "(4 (2 a) (4 (4 fine) (2 film)))",
    "(0 (2 (2 a) (1 dull)) (2 film))",
    "(2 (2 the) (2 (2 old) (2 house)))",
    "(3 (2 the) (3 (2 king) (3 (2 walked) (2 -LRB-))))",
    "(1 (2 (2 who) (2 is)) (1 (2 red) (2 ?)))",
    "(3 (3 sing) (2 !))",
]
COLUMNS = {
    "kl", "open", "kept_prediction", "sampled_kl", "sampled_open", "sampled_kept_prediction", "accuracy", "macro_f1"
}  # fmt: skip
QUICK: dict[str, Any] = {"epochs": 2.0, "fine_tune_epochs": 2.0, "bf16": False, "quiet": True}


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    path = tmp_path / "trees.txt"
    path.write_text("\n".join(TREES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Callable[..., Any], tokenizer: Any) -> Callable:
    """saved(head): the folder of a small BERT with that head."""

    def save(head: str, **settings: Any) -> str:
        folder = tmp_path_factory.mktemp("models") / head
        tiny_bert(head, **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def encoder(saved: Callable) -> str:
    return saved("Model")


def test_two_classes_leave_out_neutral_sentences_and_count_them(trees: Path) -> None:
    assert [s.label for s in sst.read_sst(trees)[0]] == [4, 0, 2, 3, 1, 3] and sst.read_sst(trees)[1] == 0
    sentences, neutral = sst.read_sst(trees, classes=2)
    assert [s.label for s in sentences] == [1, 0, 1, 0, 1] and neutral == 1


def test_a_limit_takes_sentences_evenly_spaced_and_never_more_than_there_are(trees: Path) -> None:
    every = sst.read_sst(trees)[0]
    assert sst.read_sst(trees, limit=3)[0] == every[::2]
    assert sst.read_sst(trees, limit=4)[0] == [every[i] for i in (0, 1, 3, 4)]
    assert sst.read_sst(trees, limit=100)[0] == every
    with pytest.raises(ValueError, match="limit is 0; expected 1 or more"):
        sst.read_sst(trees, limit=0)


def test_accuracy_and_macro_f1_are_those_worked_out_by_hand() -> None:
    truth, predicted = ["a", "a", "a", "b", "c"], ["a", "b", "a", "b", "b"]
    # a: precision 1, recall 2/3; b: precision 1/3, recall 1; c: never predicted
    f1 = [2 * 1 * (2 / 3) / (1 + 2 / 3), 2 * (1 / 3) * 1 / (1 / 3 + 1), 0]
    assert classification_metrics(truth, predicted) == {"accuracy": 3 / 5, "macro_f1": pytest.approx(sum(f1) / 3)}
    assert classification_metrics(truth, truth) == {"accuracy": 1, "macro_f1": 1}


def test_fine_tuning_learns_sentences_that_it_sees_often_and_a_gru_keeps_its_embeddings(
    encoder: str, tokenizer: Any, tmp_path: Path, trees: Path
) -> None:
    sentences = sst.read_sst(trees)[0]
    for architecture in ("encoder", "gru"):
        torch.manual_seed(0)
        model = sst.new_classifier(encoder, ("0", "1", "2", "3", "4"), architecture)
        before = model.get_input_embeddings().weight.clone()
        examples = sst.encode(tokenizer, [s.text for s in sentences], model)
        labels = [s.label for s in sentences]
        fine_tune(model, examples, labels, FineTuning(150, 1e-2, batch_size=3), tmp_path / "out", quiet=True)
        logits = model(**examples.collate(examples.inputs)).logits
        assert logits.argmax(-1).tolist() == labels, architecture
        assert torch.equal(model.get_input_embeddings().weight, before) == (architecture == "gru")


def test_all_windows_of_a_long_text_have_its_label(encoder: str, tokenizer: Any, tmp_path: Path) -> None:
    model = sst.new_classifier(encoder, ("0", "1"))
    examples = sst.encode(tokenizer, ["dull " * 60, "a fine film"], model)
    assert len(examples) > 2 and examples.windows is not None
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, __, given: seen.extend(
            zip(given["input_ids"].sum(-1).tolist(), given["labels"].tolist(), strict=True)
        ),
        with_kwargs=True,
    )
    fine_tune(model, examples, [1, 0], FineTuning(1, 1e-3), tmp_path / "out", quiet=True)
    expected = [
        (sum(item["input_ids"]), int(w.text == 0)) for item, w in zip(examples.inputs, examples.windows, strict=True)
    ]
    assert sorted(seen) == sorted(expected)


def check_metrics(metrics: dict, sites: int, maskings: tuple[str, ...] = ("input", "hidden")) -> None:
    assert set(metrics) == {"task", *maskings, "sentences", "seconds"}
    assert set(metrics["task"]) == {"accuracy", "macro_f1"}
    for masking in maskings:
        assert len(metrics[masking]["sites"]) == sites and metrics[masking]["task"] == metrics["task"]
        for row in (*metrics[masking]["sites"].values(), metrics[masking]["overall"]):
            assert set(row) == COLUMNS and all(math.isfinite(value) and value >= 0 for value in row.values())
            assert all(row[name] <= 1 for name in COLUMNS - {"kl", "sampled_kl"})


@pytest.mark.parametrize(("architecture", "sites"), [("encoder", 4), ("gru", 2)])
def test_a_run_goes_from_trees_to_reports_and_a_finished_one_is_not_run_again(
    architecture: str, sites: int, trees: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out, options = tmp_path / "run", {**QUICK, "architecture": architecture}
    metrics = sst.run(encoder, trees, trees, out, **options)
    check_metrics(metrics, sites)
    assert metrics["sentences"] == {"train": 6, "eval": 6, "neutral": [0, 0]}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    model = load_for(str(out / "model"))
    assert model.config.id2label[0] == "very negative" and model.config.num_labels == 5
    for masking in ("input", "hidden"):
        left = {path.name for path in (out / masking).iterdir()}
        assert left >= {"metrics.json", "report.html", "example.png", "by_site.png", "attributions.safetensors"}
        attributions = Attributions.load(out / masking / "attributions.safetensors")
        assert len(attributions) == 6 and attributions.masking == masking
        assert attributions.tokens[0] == ["[CLS]", "a", "fine", "film", "[SEP]"]
        assert load_probe(out / masking / "probe.safetensors").meta["model"] == str(out / "model")
    monkeypatch.setattr(sst, "load_for", lambda *_: pytest.fail("it was run again"))
    assert sst.run(encoder, trees, trees, out, resume=True, **options) == metrics


def test_a_classifier_of_as_many_classes_is_explained_as_it_is(saved: Callable, trees: Path, tmp_path: Path) -> None:
    model, out = saved("ForSequenceClassification"), tmp_path / "run"
    metrics = sst.run(model, trees, trees, out, classes=2, maskings=["input"], **QUICK)
    check_metrics(metrics, 4, ("input",))
    assert metrics["sentences"] == {"train": 5, "eval": 5, "neutral": [1, 1]}
    assert not (out / "model").exists() and not (out / "hidden").exists()
    assert load_probe(out / "input" / "probe.safetensors").meta["model"] == model


def test_a_classifier_of_other_classes_gets_a_new_head(saved: Callable, trees: Path, tmp_path: Path) -> None:
    model = saved("ForSequenceClassification", num_labels=3)
    sst.run(model, trees, trees, tmp_path / "run", maskings=["hidden"], **QUICK)
    assert load_for(str(tmp_path / "run" / "model")).config.num_labels == 5


@pytest.mark.parametrize(
    ("stopped_at", "architecture"), [("fine_tune", "gru"), ("save_classifier", "encoder"), ("save_probe", "gru")]
)
def test_a_run_resumes_to_the_same_bits_wherever_it_stopped(
    stopped_at: str, architecture: str, trees: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "architecture": architecture}
    whole = sst.run(encoder, trees, trees, tmp_path / "whole", **options)
    going, calls = getattr(sst, stopped_at), []

    def stop(*args: Any, **kwargs: Any) -> None:
        going(*args, **kwargs)
        calls.append(stopped_at)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sst, stopped_at, stop)
        with pytest.raises(KeyboardInterrupt):
            sst.run(encoder, trees, trees, tmp_path / "stopped", **options)
    if stopped_at != "fine_tune":  # what is there is not made again
        monkeypatch.setattr(sst, "fine_tune", lambda *_, **__: pytest.fail("it was fine-tuned again"))
    resumed = sst.run(encoder, trees, trees, tmp_path / "stopped", resume=True, **options)
    assert calls == [stopped_at] and {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    for masking in ("input", "hidden"):
        one, other = (
            load_probe(tmp_path / r / masking / "probe.safetensors").state_dict() for r in ("whole", "stopped")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def refused(match: str, kind: type[Exception], *arguments: Any, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        sst.run(*arguments, **{**QUICK, **options})
    assert "\n" not in str(caught.value)


def test_wrong_files_and_options_are_refused_in_one_line_and_leave_no_folder(
    trees: Path, encoder: str, tmp_path: Path
) -> None:
    out, broken = tmp_path / "run", tmp_path / "broken.txt"
    broken.write_text(f"{TREES[0]}\n(4 (2 a)\n")
    refused(r"broken\.txt, line 2: it ends with 1 open", ValueError, encoder, trees, broken, out)
    refused("there is no such file", FileNotFoundError, encoder, tmp_path / "nothing", trees, out)
    refused("expected 5, or 2", ValueError, encoder, trees, trees, out, classes=4)
    refused("architecture is 'lstm'", ValueError, encoder, trees, trees, out, architecture="lstm")
    refused("maskings is 'input'", ValueError, encoder, trees, trees, out, maskings="input")
    refused("maskings is ", ValueError, encoder, trees, trees, out, maskings=["both"])
    refused("no recipe 'best'", ValueError, encoder, trees, trees, out, recipe="best")
    refused("epochs is 0", ValueError, encoder, trees, trees, out, fine_tune_epochs=0.0)
    assert not out.exists()


def test_a_model_that_can_not_be_a_classifier_is_refused_in_one_line_and_leaves_the_folder_free(
    trees: Path, encoder: str, tmp_path: Path
) -> None:
    out, other = tmp_path / "run", tmp_path / "clip"
    shutil.copytree(encoder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    refused("of the type vit, of which transformers has no", ValueError, str(other), trees, trees, out)
    refused("there is no such folder", FileNotFoundError, str(tmp_path / "none"), trees, trees, out)
    (other / "config.json").write_text(
        json.dumps({**config, "model_type": "diffmask_fast_gru", "architectures": ["GRUClassifier"]})
    )
    refused("holds a GRU classifier of 2 classes: .* --architecture gru", ValueError, str(other), trees, trees, out)
    check_metrics(sst.run(encoder, trees, trees, out, maskings=["input"], **QUICK), 4, ("input",))
