from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmask_fast.models import load_for


def test_a_model_comes_back_with_its_head_in_float32_and_evaluation_mode(tiny_bert: Any, tmp_path: Path) -> None:
    model = tiny_bert()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_for(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name


def test_a_model_with_the_asked_for_head_is_taken(qa_folder: Path) -> None:
    assert type(load_for(str(qa_folder), "QuestionAnswering")).__name__ == "BertForQuestionAnswering"


def test_a_model_with_another_head_is_refused(qa_folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a BertForQuestionAnswering; expected a SequenceClassification model"):
        load_for(str(qa_folder), "SequenceClassification")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "../models/nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{path}: there is no such folder"):
        load_for(path)


@pytest.mark.parametrize(
    ("architectures", "named"), [(None, "model that names no class"), (["NoSuchModel"], "NoSuchModel")]
)
def test_a_model_without_a_known_class_is_refused(
    architectures: list[str] | None, named: str, qa_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(qa_folder, tmp_path / "model")
    config = json.loads((qa_folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(ValueError, match=f"holds a {named}; expected a model saved with its head"):
        load_for(str(tmp_path / "model"))


def test_weights_that_are_cut_short_are_refused(qa_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qa_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"the weights in .* are damaged"):
        load_for(str(tmp_path / "model"))


@pytest.mark.parametrize("left_out", ["model.safetensors", "config.json"])
def test_a_folder_without_a_whole_model_is_refused_in_one_line(left_out: str, qa_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qa_folder, tmp_path / "model")
    (tmp_path / "model" / left_out).unlink()
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load_for(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)
