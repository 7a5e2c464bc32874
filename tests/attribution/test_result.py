from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmask_fast.attribution import Attribution, Attributions

SITES = ("embedding", "layer 0", "last")
LENGTHS = (4, 1, 6)


def fields(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, texts = sum(LENGTHS), len(LENGTHS)
    return {
        "tokens": [[f"token{i}.{t}" for t in range(length)] for i, length in enumerate(LENGTHS)],
        "site_names": SITES,
        "keep": torch.rand(rows, len(SITES), generator=generator),
        "segments": torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 2, 0], dtype=torch.int8),
        "divergence": torch.rand(texts, len(SITES), generator=generator),
        "original": ["yes", "no", "日本 \ud800 \x00 </script>"],
        "masked": [["yes", "yes", "no"], ["no", "no", "no"], ["", "a", "b"]],
        "kept_prediction": torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool),
        "masking": "hidden",
        "meta": {"model": "tiny", "seed": 3, "versions": {"torch": "2.13"}, "tolerance": 0.1},
    }


@pytest.fixture
def result() -> Attributions:
    return Attributions(**fields())


def test_a_text_gets_its_own_rows(result: Attributions) -> None:
    assert [len(text) for text in result] == list(LENGTHS) == result.lengths.tolist()
    for i, first in enumerate((0, 4, 5)):
        text = result[i]
        assert isinstance(text, Attribution)
        assert text.tokens == result.tokens[i]
        assert torch.equal(text.keep, result.keep[first : first + LENGTHS[i]])
        assert torch.equal(text.segments, result.segments[first : first + LENGTHS[i]])
        assert torch.equal(text.divergence, result.divergence[i])
        assert (text.original, text.masked) == (result.original[i], result.masked[i])


def test_a_text_is_a_view_and_not_a_copy(result: Attributions) -> None:
    assert result[2].keep.untyped_storage().data_ptr() == result.keep.untyped_storage().data_ptr()


def test_a_negative_index_counts_from_the_end(result: Attributions) -> None:
    assert result[-1].tokens == result[2].tokens


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_the_texts_says_how_many_there_are(result: Attributions, index: int) -> None:
    with pytest.raises(IndexError, match="there are 3 texts"):
        result[index]


@pytest.mark.parametrize("index", ["0", 1.0, True, None])
def test_an_index_of_another_type_is_refused(result: Attributions, index: Any) -> None:
    with pytest.raises(TypeError, match="number of a text or a slice"):
        result[index]


@pytest.mark.parametrize("chosen", [slice(1, 3), slice(None, None, -1), slice(0, 3, 2), slice(3, 9)])
def test_a_slice_has_the_texts_that_a_list_would_give(result: Attributions, chosen: slice) -> None:
    assert result[chosen].to_dict()["texts"] == result.to_dict()["texts"][chosen]


@pytest.mark.parametrize("chosen", [slice(1, 3), slice(None, None, -1)])
def test_scores_and_details_go_with_their_texts(result: Attributions, chosen: slice, tmp_path: Path) -> None:
    details = {"forwards": torch.arange(result.divergence.numel()).float().reshape(result.divergence.shape)}
    scored = dataclasses.replace(result, scores=-3 * result.keep, details=details)
    scored.save(tmp_path / "scored.safetensors")
    loaded = Attributions.load(tmp_path / "scored.safetensors")[chosen]
    for one, number in zip(loaded, range(len(result))[chosen], strict=True):
        assert one.scores is not None and torch.equal(one.scores, -3 * result[number].keep)
        assert torch.equal(one.details["forwards"], details["forwards"][number])
    assert loaded.to_dict()["texts"] == scored.to_dict()["texts"][chosen]


@pytest.mark.parametrize("segment", [None, 0, 1, 2])
def test_mean_keep_is_the_mean_over_texts_of_the_mean_over_tokens(result: Attributions, segment: int | None) -> None:
    means = []
    for text in result:
        chosen = text.keep.double() if segment is None else text.keep.double()[text.segments == segment]
        if len(chosen):
            means.append(chosen.mean(0))
    # the oracle is float64; what comes back is rounded once, to float32
    torch.testing.assert_close(
        result.mean_keep(segment).double(),
        torch.stack(means).mean(0),
        rtol=torch.finfo(torch.float32).eps,
        atol=0,
    )


def test_mean_keep_says_which_segments_there_are(result: Attributions) -> None:
    with pytest.raises(ValueError, match=r"no token has segment 2; the segments here are \[1\]"):
        result[1:2].mean_keep(segment=2)


def test_mean_keep_of_no_texts_is_an_error(result: Attributions) -> None:
    with pytest.raises(ValueError, match="there are no texts"):
        result[3:].mean_keep()


def test_save_and_load_give_the_same_back(result: Attributions, tmp_path: Path) -> None:
    result.save(tmp_path / "a.safetensors")
    loaded = Attributions.load(tmp_path / "a.safetensors")
    for field in dataclasses.fields(result):
        ours, theirs = getattr(result, field.name), getattr(loaded, field.name)
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        else:
            assert ours == theirs
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_slice_and_an_empty_result_can_be_saved(result: Attributions, tmp_path: Path) -> None:
    for part in (result[1:2], result[3:]):
        part.save(tmp_path / "a")
        assert Attributions.load(tmp_path / "a").to_dict() == part.to_dict()


def test_the_dict_survives_json(result: Attributions) -> None:
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_the_dict_holds_the_values(result: Attributions) -> None:
    text = result.to_dict()["texts"][1]
    assert text["tokens"] == ["token1.0"]
    assert torch.equal(torch.tensor(text["keep"]), result[1].keep)
    assert text["kept_prediction"] == [True, True, True]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Attributions.load(tmp_path / "none")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_file_that_is_cut_short_is_refused(result: Attributions, tmp_path: Path, share: float) -> None:
    path = tmp_path / "a"
    result.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cut short"):
        Attributions.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a tensor in sight, but long enough to hold a header")
    with pytest.raises(ValueError, match="not an attributions file"):
        Attributions.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model")
    with pytest.raises(ValueError, match=r"not one that Attributions\.save wrote"):
        Attributions.load(tmp_path / "model")


def rewritten(result: Attributions, path: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    result.save(path)
    description = {
        "format": "diffmask_fast.attributions",
        "version": 1,
        "method": "diffmask",
        "masking": "input",
    }
    description |= {"site_names": list(SITES), "meta": {}, **change}
    save_file({**load_file(path), **tensors}, path, metadata={"diffmask_fast": json.dumps(description)})
    return path


def test_a_format_version_of_the_future_is_refused(result: Attributions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format version 2, this diffmask_fast reads version 1"):
        Attributions.load(rewritten(result, tmp_path / "a", {"version": 2}, {}))


@pytest.mark.parametrize(
    ("change", "tensors"),
    [
        ({}, {"keep": torch.full((11, 3), 1.5)}),
        ({}, {"segments": torch.zeros(3, dtype=torch.int8)}),
        ({}, {"texts": torch.zeros(5, dtype=torch.uint8)}),
        ({}, {"texts": torch.zeros(5)}),
        ({"site_names": ["a"]}, {}),
        ({"masking": 3}, {}),
        ({"meta": None}, {}),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(
    result: Attributions, tmp_path: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"a is damaged: .*; write it again"):
        Attributions.load(rewritten(result, tmp_path / "a", change, tensors))


WRONG = [
    ("keep", lambda x: x * 2, ValueError, r"keep: expected probabilities"),
    ("keep", lambda x: -x, ValueError, r"keep: expected probabilities"),
    (
        "keep",
        lambda x: x.clone().index_fill_(0, torch.tensor([3]), float("nan")),
        ValueError,
        r"got nan at \[3, 0\]",
    ),
    ("keep", lambda x: x[:-1], ValueError, r"keep: expected shape \(11, 3\)"),
    ("keep", lambda x: x.double(), TypeError, r"keep: expected torch.float32 .* got torch.float64"),
    ("keep", lambda x: x.clone().requires_grad_(), TypeError, r"with gradient; use .detach"),
    ("keep", lambda x: x.tolist(), TypeError, r"keep: expected a tensor, got list"),
    ("keep", lambda x: x.to("meta"), TypeError, r"on the CPU .* got torch.float32 on meta"),
    ("segments", lambda x: x + 1, ValueError, r"segments: expected 0 special"),
    ("segments", lambda x: x.long(), TypeError, r"segments: expected torch.int8"),
    ("divergence", lambda x: x - 1, ValueError, r"clamp rounding errors"),
    ("divergence", lambda x: x / 0, ValueError, r"divergence: expected KL .* got inf"),
    ("divergence", lambda x: x[:, :2], ValueError, r"divergence: expected shape \(3, 3\)"),
    ("kept_prediction", lambda x: x.float(), TypeError, r"kept_prediction: expected torch.bool"),
    ("tokens", lambda x: x[:2], ValueError, r"original: expected 2 entries, one per text, got 3"),
    ("tokens", lambda x: [[], *x[1:]], ValueError, r"tokens of text 0: expected at least one token"),
    ("tokens", lambda x: [[1, 2, 3, 4], *x[1:]], TypeError, r"tokens of text 0: expected a list of str"),
    ("tokens", lambda x: ["abcd", *x[1:]], TypeError, r"tokens of text 0: expected a list of str"),
    ("tokens", lambda x: tuple(x), TypeError, r"tokens: expected a list"),
    ("original", lambda x: [*x[:2], None], TypeError, r"original of text 2: expected a str"),
    ("masked", lambda x: [x[0][:2], *x[1:]], ValueError, r"masked of text 0: expected 3 predictions"),
    ("masked", lambda x: [*x[:2], "abc"], TypeError, r"masked of text 2: expected a list of str"),
    ("site_names", lambda x: "abc", TypeError, r"site_names: expected a sequence"),
    ("site_names", lambda x: ("a", "a", "b"), ValueError, r"no name twice"),
    ("site_names", lambda x: (), ValueError, r"at least one name"),
    ("masking", lambda x: "both", ValueError, r'expected "input" or "hidden", got \'both\''),
    ("meta", lambda x: {"seed": torch.tensor(1)}, TypeError, r"meta: expected values that JSON can hold"),
    ("meta", lambda x: {"loss": float("nan")}, TypeError, r"meta: expected values that JSON can hold"),
    ("meta", lambda x: None, TypeError, r"meta: expected a dict"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG)
def test_a_wrong_field_is_one_error_that_names_it(name: str, change: Any, error: type, message: str) -> None:
    values = fields()
    with pytest.raises(error, match=message):
        Attributions(**{**values, name: change(values[name])})


def test_meta_is_the_results_own(result: Attributions) -> None:
    values = fields()
    made = Attributions(**values)
    values["meta"]["versions"]["torch"] = "changed"
    assert made.meta == result.meta


def test_the_result_object_needs_nothing_but_torch() -> None:
    code = (
        "import sys, diffmask_fast.attribution, diffmask_fast.report, diffmask_fast.report.html; "
        "print({'safetensors', 'rich', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
