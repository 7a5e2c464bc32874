from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_probe import TOLERANCE, a_probe
from torch import Tensor

from diffmask_fast.attribution import Attributions
from diffmask_fast.attribution.explain import explain, explain_batch
from diffmask_fast.attribution.windows import merge, merge_keep, merge_scores, whole_texts
from diffmask_fast.data import Examples, Window, encode
from diffmask_fast.masking import frozen
from diffmask_fast.predictions import LONGEST_SPAN, Classes, Kind, Span
from diffmask_fast.sites import patch

STORY = (
    "the old king walked in paris , a dull queen build ##ing the new house of fish and dog in rome . who is year 1 ?"
)
PASSAGE = f"{STORY} {STORY} a film , where the cat sing ##s and the bird play ##ed"
PAIRS = [("what ?", "a cat"), ("who was king ?", PASSAGE), ("where ?", STORY), ("is the fish red ?", STORY + " fine")]
SINGLES = ["a fine film", PASSAGE, "dull"]
STRIDE = 6


def windows_of(length: int, cut: range, room: int, stride: int) -> list[Window]:
    windows, start = [], cut.start
    while True:
        windows.append(Window(0, length, cut, range(start, min(start + room, cut.stop))))
        if start + room >= cut.stop:
            return windows
        start += room - stride


def keep_of_token(token: int, windows: list[Window], keeps: list[Tensor]) -> Tensor:
    """The rule for one token of the whole text, one window after the other."""
    values = [
        (window, keep[window.positions.index(token)])
        for window, keep in zip(windows, keeps, strict=True)
        if token in window.positions
    ]
    if token not in windows[0].cut:
        return torch.stack([value for _, value in values]).amax(0)

    def scarcer(window: Window) -> int:
        return min(sum(t < token for t in window.piece), sum(t > token for t in window.piece))

    return max(values, key=lambda pair: scarcer(pair[0]))[1]  # the first of several


@pytest.mark.parametrize("length, cut", [(40, range(6, 39)), (40, range(1, 40)), (23, range(0, 23)), (40, range(1, 8))])
@pytest.mark.parametrize("room, stride", [(7, 0), (8, 3), (8, 4), (9, 7), (20, 5)])
def test_keep_is_merged_as_the_rule_says_token_by_token(length: int, cut: range, room: int, stride: int) -> None:
    windows = windows_of(length, cut, room, stride)
    generator = torch.Generator().manual_seed(0)
    keeps = [torch.rand(len(window.positions), 3, generator=generator) for window in windows]
    merged = merge_keep(windows, keeps)
    expected = torch.stack([keep_of_token(token, windows, keeps) for token in range(length)])
    assert torch.equal(merged, expected)


def test_keep_of_two_windows_worked_by_hand() -> None:
    # tokens 0 and 7 stand in both windows; the pieces are 1 2 3 4 and 3 4 5 6, and share 3 and 4
    windows = windows_of(8, range(1, 7), room=4, stride=2)
    first = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])[:, None]  # tokens 0 1 2 3 4 7
    second = torch.tensor([0.9, 0.8, 0.7, 0.75, 0.65, 0.3])[:, None]  # tokens 0 3 4 5 6 7
    # 3 has one token behind it in the first piece and none before it in the second; 4 the other way round
    assert merge_keep(windows, [first, second]).squeeze(-1).tolist() == pytest.approx(
        [0.9, 0.2, 0.3, 0.4, 0.7, 0.75, 0.65, 0.6]
    )


def test_the_middle_of_what_two_windows_share_comes_from_the_earlier_one() -> None:
    windows = windows_of(
        7, range(0, 7), room=5, stride=3
    )  # 0 1 2 3 4 and 2 3 4 5 6: token 3 has one behind or before it
    merged = merge_keep(windows, [torch.full((5, 1), 0.25), torch.full((5, 1), 0.75)])
    assert merged.squeeze(-1).tolist() == [0.25] * 4 + [0.75] * 3


def test_scores_of_two_windows_worked_by_hand() -> None:
    windows = windows_of(8, range(1, 7), room=4, stride=2)
    first = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, -0.6])[:, None]  # tokens 0 1 2 3 4 7
    second = torch.tensor([-0.9, 0.8, -0.7, 0.75, 0.65, 0.3])[:, None]  # tokens 0 3 4 5 6 7
    rows = [{"scores": first}, {"scores": second}]
    merged = merge_scores(windows, rows)
    assert merged is not None
    # what stands in both has the value of the larger size, with its sign
    assert merged.squeeze(-1).tolist() == pytest.approx([-0.9, -0.2, 0.3, -0.4, -0.7, 0.75, 0.65, -0.6])
    assert torch.equal(merge_scores(windows, rows[:1]), first)


def rows_of(
    kind: Kind, scores: list[list[list[float]]], answers: list[list[list[int]]], lengths: list[int]
) -> list[dict]:
    """One row for each window, with a score and an answer for the original prediction and each site's."""
    return [
        {
            "keep": torch.zeros(length, len(score) - 1),
            "divergence": torch.arange(len(score) - 1) + 1.0 + 10 * i,
            "scores": None,
            "details": {"forwards": torch.arange(len(score) - 1) + 4.0 * i},
            "kind": kind,
            "asked": True,
            "answer_scores": torch.tensor(score),
            "answers": torch.tensor(answer),
        }
        for i, (score, answer, length) in enumerate(zip(scores, answers, lengths, strict=True))
    ]


def three_windows() -> Examples:
    windows = windows_of(12, range(2, 11), room=5, stride=3)
    return Examples(
        [{"input_ids": window.positions} for window in windows],
        [[f"t{at}" for at in window.positions] for window in windows],
        [window.take([0, 1, *[2] * 9, 0]) for window in windows],
        lambda i, answer: f"{i}:{','.join(map(str, answer))}",
        windows=windows,
    )


def test_a_span_is_that_of_the_window_with_the_highest_score_and_numbered_as_in_the_whole_text() -> None:
    examples = three_windows()
    assert [window.positions for window in examples.windows or ()] == [
        [0, 1, 2, 3, 4, 5, 6, 11],
        [0, 1, 4, 5, 6, 7, 8, 11],
        [0, 1, 6, 7, 8, 9, 10, 11],
    ]
    rows = rows_of(
        Span(),
        # the original, and three sites: the same span of another window, another span, two windows alike
        [[[1.0], [5.0], [0.0], [4.0]], [[3.0], [2.0], [1.0], [4.0]], [[2.0], [3.0], [7.0], [0.0]]],
        [[[2, 2], [4, 5], [2, 2], [5, 6]], [[2, 3], [2, 2], [2, 2], [2, 3]], [[2, 2], [2, 2], [5, 6], [2, 2]]],
        [8, 8, 8],
    )
    text = merge(examples, [0, 1, 2], rows)
    assert text["original"] == "1:2,3"
    assert text["masked"] == ["0:4,5", "2:5,6", "0:5,6"]
    assert text["kept_prediction"].tolist() == [True, False, False]
    assert text["tokens"] == [f"t{at}" for at in range(12)]
    assert text["segments"] == [0, 1, *[2] * 9, 0]
    assert text["divergence"].tolist() == [11.0, 12.0, 13.0]


def test_a_class_has_the_highest_mean_probability_over_the_windows() -> None:
    # two windows lean to class 0, by a little; one is sure of class 1
    original = [[0.55, 0.45], [0.55, 0.45], [0.05, 0.95]]
    masked = [[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]
    scores = torch.tensor([original, masked]).transpose(0, 1).unsqueeze(2).log().tolist()
    text = merge(three_windows(), [0, 1, 2], rows_of(Classes(), scores, [[[0], [0]]] * 3, [8, 8, 8]))
    assert (text["original"], text["masked"]) == ("0:1", ["0:0"])
    assert text["kept_prediction"].tolist() == [False]


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_the_whole_text_is_merged_from_what_each_window_alone_gives(
    masking: str, head: str, tiny_bert: Any, tokenizer: Any
) -> None:
    model, text = tiny_bert(head), PAIRS[1] if head == "ForQuestionAnswering" else SINGLES[1]
    examples = encode(tokenizer, [text], model, STRIDE)
    assert examples.windows is not None and len(examples) > 2
    result = explain(model, a_probe(masking), examples)
    alone = [
        explain(model, a_probe(masking), Examples(one.inputs, one.tokens, one.segments, one.describe))[0]
        for one in (examples.select([i]) for i in range(len(examples)))
    ]
    assert len(result) == 1
    one, row = result[0], (text,) if isinstance(text, str) else text
    assert one.tokens == tokenizer.convert_ids_to_tokens(tokenizer(*row)["input_ids"])
    parts = tokenizer(*row).sequence_ids()
    assert one.segments.tolist() == [0 if part is None else part + 1 for part in parts]
    expected = [
        keep_of_token(token, examples.windows, [window.keep for window in alone]) for token in range(len(one.tokens))
    ]
    torch.testing.assert_close(one.keep, torch.stack(expected), rtol=0, atol=TOLERANCE)
    divergence = sum(window.divergence for window in alone) / len(alone)
    torch.testing.assert_close(one.divergence, divergence, rtol=TOLERANCE, atol=TOLERANCE)
    # a prediction on the whole text is that on one of the windows
    assert one.original in {window.original for window in alone}
    for site, masked in enumerate(one.masked):
        assert masked in {window.masked[site] for window in alone}
        if masked != one.original:
            assert not one.kept_prediction[site]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_long_and_short_texts_are_explained_alike_alone_and_in_any_batch(
    head: str, batch_size: int, tiny_bert: Any, tokenizer: Any
) -> None:
    model, texts = tiny_bert(head), PAIRS if head == "ForQuestionAnswering" else SINGLES
    together = explain(model, a_probe(), encode(tokenizer, texts, model, STRIDE), batch_size=batch_size)
    assert len(together) == len(texts)
    for i, text in enumerate(texts):
        alone, batched = explain(model, a_probe(), encode(tokenizer, [text], model, STRIDE))[0], together[i]
        # a token at the threshold could go either way: the comparison must not rest on one
        assert ((alone.keep - 0.5).abs() > TOLERANCE).all()
        torch.testing.assert_close(batched.keep, alone.keep, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(batched.divergence, alone.divergence, rtol=TOLERANCE, atol=TOLERANCE)
        assert batched.tokens == alone.tokens and torch.equal(batched.segments, alone.segments)
        assert (batched.original, batched.masked) == (alone.original, alone.masked)
        assert torch.equal(batched.kept_prediction, alone.kept_prediction)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_a_text_that_fits_comes_out_to_the_bit_as_it_was_found(head: str, tiny_bert: Any, tokenizer: Any) -> None:
    model, texts = tiny_bert(head), PAIRS if head == "ForQuestionAnswering" else SINGLES
    examples, probe = encode(tokenizer, texts, model, STRIDE), a_probe()
    result = explain(model, probe, examples, batch_size=1)[0]
    with frozen(model), patch(model) as patched, torch.no_grad():
        (row,) = explain_batch(patched, probe, encode(tokenizer, texts[:1], model), [0])
    assert torch.equal(result.keep, row["keep"]) and torch.equal(result.divergence, row["divergence"])
    answers = row["answers"].tolist()
    assert [result.original, *result.masked] == [examples.describe(0, answer) for answer in answers]
    assert result.kept_prediction.tolist() == [answer == answers[0] for answer in answers[1:]]


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_where_every_window_keeps_everything_the_prediction_stays(masking: str, reader: Any, tokenizer: Any) -> None:
    probe = a_probe(masking)
    for head in probe.heads:
        head.bias.data.fill_(50.0)
    result = explain(reader, probe, encode(tokenizer, PAIRS, reader, STRIDE))
    assert result.kept_prediction.all() and (result.keep > 0.5).all()
    assert (result.divergence <= TOLERANCE).all()
    for (_, passage), original in zip(PAIRS, result.original, strict=True):
        assert original and original in passage


def test_keep_never_rises_with_depth_in_merged_windows_either(reader: Any, tokenizer: Any) -> None:
    keep = explain(reader, a_probe(), encode(tokenizer, PAIRS, reader, STRIDE)).keep
    assert (keep[:, 1:] <= keep[:, :-1]).all() and (keep[:, -1] < keep[:, 0]).all()


def test_long_texts_need_no_option(reader: Any, tokenizer: Any) -> None:
    result = explain(reader, a_probe(), PAIRS, tokenizer)
    lengths = [len(tokenizer(*pair)["input_ids"]) for pair in PAIRS]
    assert result.lengths.tolist() == lengths and max(lengths) > 32


def test_some_windows_of_a_text_are_not_taken_for_the_whole(reader: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, PAIRS, reader, STRIDE)
    texts = whole_texts(examples)
    assert [len(numbers) for numbers in texts] == [1, 4, 2, 2]
    assert [i for numbers in texts for i in numbers] == list(range(9))
    for chosen in ([0, 1, 2], [0, 2, 3, 4], [1, 2, 4], [4, 3, 2, 1], [5, 7, 6, 8]):
        with pytest.raises(ValueError, match=r"text \d is not whole here: give all its windows"):
            explain(reader, a_probe(), examples.select(chosen))


def test_whole_texts_may_be_selected_in_any_order_and_more_than_once(reader: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, PAIRS, reader, STRIDE)
    texts = whole_texts(examples)
    whole = explain(reader, a_probe(), examples)
    order = [2, 2, 0, 0, 1, 3]
    chosen = explain(reader, a_probe(), examples.select([i for text in order for i in texts[text]]))
    assert chosen.tokens == [whole.tokens[text] for text in order]
    assert chosen.original == [whole.original[text] for text in order]
    for one, text in zip(chosen, order, strict=True):
        torch.testing.assert_close(one.keep, whole[text].keep, rtol=0, atol=TOLERANCE)


def test_the_result_of_a_long_text_is_saved_and_read_like_any_other(
    reader: Any, tokenizer: Any, tmp_path: Path
) -> None:
    result = explain(reader, a_probe(), encode(tokenizer, PAIRS, reader, STRIDE), meta={"seed": 0})
    result.save(tmp_path / "a.safetensors")
    again = Attributions.load(tmp_path / "a.safetensors")
    assert again.to_dict() == result.to_dict()
    assert again[1].tokens == tokenizer.convert_ids_to_tokens(tokenizer(*PAIRS[1])["input_ids"])


def best_span_of_any_window(model: Any, tokenizer: Any, question: str, passage: str) -> tuple[str, int]:
    """As evaluations on SQuAD go: the span in the passage with the highest start plus end logit, over all windows."""
    encoded = tokenizer(
        question, passage, truncation="only_second", max_length=512, stride=128, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    best: tuple[float, str, int] = (float("-inf"), "", -1)
    for i, ids in enumerate(encoded["input_ids"]):
        inputs = {"input_ids": ids, "token_type_ids": encoded["token_type_ids"][i], "attention_mask": [1] * len(ids)}
        with torch.no_grad():
            output = model(**{name: torch.tensor([row]) for name, row in inputs.items()})
        starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        inside = [token for token, part in enumerate(encoded.sequence_ids(i)) if part == 1]
        score, first, last = max(
            (starts[s] + ends[e], s, e) for s in inside for e in range(s, min(s + LONGEST_SPAN, inside[-1] + 1))
        )
        offsets = encoded["offset_mapping"][i]
        best = max(best, (score, passage[offsets[first][0] : offsets[last][1]], i))
    return best[1], best[2]


@pytest.mark.shared
@pytest.mark.slow
def test_long_real_questions_are_explained_whole(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from diffmask_fast.models import load_for

    folder = shared / "models" / "minilm-l6-squad"
    model, tokenizer = load_for(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    content = json.loads((shared / "data" / "squad" / "train.json").read_text(encoding="utf-8"))
    paragraphs = [paragraph for article in content["data"] for paragraph in article["paragraphs"]]
    long = [p for p in paragraphs if len(tokenizer(p["context"], verbose=False)["input_ids"]) > 512][:3]
    pairs = [(paragraph["qas"][0]["question"], paragraph["context"]) for paragraph in long]
    result = explain(model, a_probe(sites=8, width=384), pairs, tokenizer)
    references = [best_span_of_any_window(model, tokenizer, *pair) for pair in pairs]
    assert result.original == [answer for answer, _ in references]
    assert len({window for _, window in references}) > 1  # answers lie in first windows and in later ones
    for pair, one in zip(pairs, result, strict=True):
        assert one.tokens == tokenizer.convert_ids_to_tokens(tokenizer(*pair, verbose=False)["input_ids"])
        assert len(one.tokens) > 512
        assert (one.keep[:, 1:] <= one.keep[:, :-1]).all()
