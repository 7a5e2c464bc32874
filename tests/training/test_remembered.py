from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.predictions import Classes, Span
from diffmask_fast.sites import patch
from diffmask_fast.training import remembered as module
from diffmask_fast.training.remembered import RememberedPredictions, fingerprint, remembered_for

SIZES = [(4, 4), (2, 2), (5, 5)]


def tables(*rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end tables of these rows of SIZES, padded as a batch is."""
    generator = torch.Generator().manual_seed(7)
    every = torch.randn(2, len(SIZES), 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([size for size, _ in SIZES])[:, None]
    start, end = (F.log_softmax(t.masked_fill(~mask, -1e9), -1)[list(rows)] for t in every)
    width = max(SIZES[row][0] for row in rows)
    return start[:, :width], end[:, :width]


def test_what_was_put_is_what_one_gets_in_any_batch(tmp_path: Path) -> None:
    predictions = RememberedPredictions(tmp_path, "a", SIZES)
    assert predictions.get([0, 1]) is None
    predictions.put([0, 2], tables(0, 2))
    predictions.put([1], tables(1))
    for rows in ([0, 1, 2], [2, 0], [1], [1, 0]):
        got = predictions.get(rows)
        assert got is not None
        for ours, expected in zip(got, tables(*rows), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        masked = tuple(torch.log_softmax(t, -1) for t in torch.randn(2, *got[0].shape))
        assert torch.equal(Span().divergence(got, masked), Span().divergence(tables(*rows), masked))


def test_another_run_finds_them_and_two_may_share_the_file(tmp_path: Path) -> None:
    first, second = RememberedPredictions(tmp_path, "a", SIZES), RememberedPredictions(tmp_path, "a", SIZES)
    first.put([0], tables(0))
    second.put([1], tables(1))
    third = RememberedPredictions(tmp_path, "a", SIZES)
    for predictions in (first, second, third):
        got = predictions.get([0, 1])
        assert got is not None and torch.equal(got[0], tables(0, 1)[0])
    assert first.path.stat().st_size == first.nbytes == 8 * 3 + 4 * 22


def test_a_damaged_row_is_not_known_and_is_computed_again(tmp_path: Path) -> None:
    predictions = RememberedPredictions(tmp_path, "a", SIZES)
    predictions.put([0, 1, 2], tables(0, 1, 2))
    content = bytearray(predictions.path.read_bytes())
    content[8 * 3 + 4 * 8 + 1] ^= 1  # one bit of the second row
    predictions.path.write_bytes(content)
    again = RememberedPredictions(tmp_path, "a", SIZES)
    assert again.get([1]) is None and again.get([0, 1]) is None and again.get([0, 2]) is not None
    again.put([1], tables(1))
    assert again.get([0, 1, 2]) is not None


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 1000])
def test_a_file_of_another_size_is_made_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "predictions-a.bin").write_bytes(content)
    predictions = RememberedPredictions(tmp_path, "a", SIZES)
    assert predictions.path.stat().st_size == predictions.nbytes
    assert predictions.get([0]) is None


def test_files_of_another_fingerprint_are_removed_and_nothing_else(tmp_path: Path) -> None:
    RememberedPredictions(tmp_path, "a", SIZES)
    (tmp_path / "other.bin").write_bytes(b"mine")
    RememberedPredictions(tmp_path, "b", SIZES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.bin", "predictions-b.bin"]


def test_a_full_disk_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for 0 MB of predictions"):
        RememberedPredictions(tmp_path, "a", SIZES)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def examples() -> Examples:
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
    tokens = [[str(i) for i in row] for row in ids]
    return Examples([{"input_ids": row} for row in ids], tokens, [[1] * len(row) for row in ids], lambda i, a: str(a))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_for_a_model_they_are_its_predictions(head: str, tiny_bert: Any, examples: Examples, tmp_path: Path) -> None:
    model = tiny_bert(head)
    with frozen(model), patch(model) as patched, torch.no_grad():
        predictions = remembered_for(patched, model, examples, tmp_path)
        inputs = examples.collate([examples[i] for i in (2, 0)])
        kind = Span() if head == "ForQuestionAnswering" else Classes()
        expected = kind.tables(model(**inputs), inputs)
        predictions.put([2, 0], expected)
    got = predictions.get([2, 0])
    assert got is not None and len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_fingerprint_knows_weights_texts_and_dtype(tiny_bert: Any, examples: Examples) -> None:
    model = tiny_bert("ForSequenceClassification")
    found = [fingerprint(model, examples), fingerprint(model, examples.select([0, 1])), fingerprint(model, examples)]
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    found += [fingerprint(model, examples), fingerprint(model.bfloat16(), examples)]
    assert found[0] == found[2] and len(set(found)) == 4
