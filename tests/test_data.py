from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from diffmask_fast.data import Examples, TooLongError, Window, encode, length_limit
from diffmask_fast.predictions import AtPositions

PAIRS = [
    ("who was king?", "the old king walked in münchen ."),
    ("where is the film?", "a dull film 東京 , paris"),
]


@pytest.fixture(scope="module")
def classifier(tiny_bert: Any) -> Any:
    return tiny_bert(id2label={0: "bad", 1: "good", 2: "so so"}, label2id={"bad": 0, "good": 1, "so so": 2})


def ragged() -> Examples:
    inputs = [{"input_ids": [5] * n, "label": float(n)} for n in (3, 1, 2)]
    tokens = [["x"] * len(item["input_ids"]) for item in inputs]
    return Examples(
        inputs,
        tokens,
        [[1] * len(t) for t in tokens],
        lambda i, a: f"{i}:{a[0]}",
        {"input_ids": 9},
        frozenset({"label"}),
    )


def test_a_ragged_batch_is_padded_on_the_right_to_its_longest_text() -> None:
    examples = ragged()
    batch = examples.collate([examples[i] for i in (1, 2)])
    assert batch["input_ids"].tolist() == [[5, 9], [5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["label"].tolist() == [1.0, 2.0]


def test_padding_is_the_tokenizers_own_and_is_masked_out(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, ["a film", "the old king walked ."], classifier)
    batch = examples.collate([examples[0], examples[1]])
    expected = tokenizer.pad([examples[0], examples[1]], return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_an_attention_mask_that_is_given_is_kept() -> None:
    batch = ragged().collate([{"input_ids": [1, 2], "attention_mask": [1, 0], "label": 0.0}])
    assert batch["attention_mask"].tolist() == [[1, 0]]


def test_tokens_and_ids_are_the_tokenizers(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, ["A fine film!"], classifier)
    assert examples.tokens == [["[CLS]", "a", "fine", "film", "!", "[SEP]"]]
    assert examples[0]["input_ids"] == tokenizer("A fine film!")["input_ids"]
    assert examples.lengths == [6]


def test_segments_tell_special_tokens_question_and_passage_apart(tokenizer: Any, classifier: Any) -> None:
    pair, single = encode(tokenizer, [("who was king?", "the king"), "the king"], classifier).segments
    assert pair == [0, 1, 1, 1, 1, 0, 2, 2, 0]
    assert single == [0, 1, 1, 0]


# Words that all differ from their neighbours, so that a token in a wrong place shows.
STORY = (
    "the old king walked in paris , a dull queen build ##ing the new house of fish and dog in rome . who is year 1 ?"
)
LONG = [
    f"{STORY} {STORY} film",
    ("who was the king ?", f"{STORY} {STORY}"),
    ("what ?", f"[SEP] {STORY} [CLS] a film [SEP]"),
]


@pytest.mark.parametrize("stride", [0, 1, 8, 13])
@pytest.mark.parametrize("text", LONG)
def test_windows_are_those_that_the_tokenizer_makes_itself(
    text: Any, stride: int, tokenizer: Any, classifier: Any
) -> None:
    row = (text,) if isinstance(text, str) else text
    expected = tokenizer(
        *row, truncation="only_first" if isinstance(text, str) else "only_second", max_length=32, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    examples = encode(tokenizer, [text], classifier, stride)
    assert len(examples) == len(expected["input_ids"]) > 1
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert [examples[i][name] for i in range(len(examples))] == expected[name]
    assert examples.tokens == [tokenizer.convert_ids_to_tokens(ids) for ids in expected["input_ids"]]
    for i, offsets in enumerate(expected["offset_mapping"]):
        for token, kind in enumerate(examples.segments[i]):
            if kind:
                first, last = offsets[token]
                assert examples.describe(i, (token, token)) == row[kind - 1][first:last]


@pytest.mark.parametrize("stride", [0, 1, 8, 13])
@pytest.mark.parametrize("text", LONG)
def test_windows_hold_each_token_and_share_just_the_stride(
    text: Any, stride: int, tokenizer: Any, classifier: Any
) -> None:
    row = (text,) if isinstance(text, str) else text
    whole = tokenizer.convert_ids_to_tokens(tokenizer(*row)["input_ids"])
    examples = encode(tokenizer, [text], classifier, stride)
    windows = examples.windows
    assert windows is not None and {(w.text, w.length, w.cut) for w in windows} == {(0, len(whole), windows[0].cut)}
    for window, tokens in zip(windows, examples.tokens, strict=True):
        assert [whole[at] for at in window.positions] == tokens
        assert set(window.positions) - set(window.piece) == set(range(len(whole))) - set(window.cut)
    assert sorted({at for window in windows for at in window.positions}) == list(range(len(whole)))
    for before, after in pairwise(windows):
        assert list(before.piece)[len(before.piece) - stride :] == list(after.piece)[:stride]
        assert not set(list(before.piece)[: len(before.piece) - stride]) & set(after.piece)
    assert examples.lengths[:-1] == [32] * (len(windows) - 1) and examples.lengths[-1] <= 32


def test_one_token_too_many_makes_a_second_window(tokenizer: Any, classifier: Any) -> None:
    fits = encode(tokenizer, ["film " * 30], classifier)  # with [CLS] and [SEP] just what the model takes
    assert fits.lengths == [32] and fits.windows is None
    cut = encode(tokenizer, ["film " * 31], classifier, stride=4)
    assert cut.lengths == [32, 7]
    assert cut.windows == [Window(0, 33, range(1, 32), range(1, 31)), Window(0, 33, range(1, 32), range(27, 32))]


def test_windows_share_a_quarter_of_what_the_model_takes_but_128_tokens_at_most(
    tokenizer: Any, classifier: Any
) -> None:
    for limit, expected in ((32, 8), (1024, 128)):
        larger = copy.deepcopy(tokenizer)
        larger.model_max_length = limit
        first, second = encode(larger, ["film " * limit], None).windows or ()
        assert len(set(first.piece) & set(second.piece)) == expected


def test_texts_that_fit_stand_whole_between_texts_that_were_cut(tokenizer: Any, classifier: Any) -> None:
    texts = ["a film", *LONG, ("who ?", "the king")]
    examples = encode(tokenizer, texts, classifier, stride=5)
    numbers = [window.text for window in examples.windows or ()]
    assert numbers == sorted(numbers) and set(numbers) == set(range(5))
    for text, at in ((0, 0), (4, len(examples) - 1)):
        alone = encode(tokenizer, [texts[text]], classifier)
        assert numbers.count(text) == 1 and numbers[at] == text
        assert (examples[at], examples.tokens[at], examples.segments[at]) == (
            alone[0],
            alone.tokens[0],
            alone.segments[0],
        )


def test_a_span_in_a_later_window_is_described_by_its_slice_of_the_whole_text(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, [("Who ?", "film " * 40 + "the  OLD\tKing")], classifier, stride=3)
    assert "old" not in examples.tokens[0]
    start = examples.tokens[1].index("old")
    assert examples.describe(1, (start, start + 1)) == "OLD\tKing"
    assert examples.describe(1, (1, start)) == "(no span)"


@pytest.mark.parametrize(
    ("text", "stride", "said"),
    [
        (("film " * 25, "king " * 9), 4, "has 37 tokens and the model takes 32, and 28 of them"),
        (("film " * 40, "king"), 0, "has 44 tokens and the model takes 32, and 43 of them"),
        ("film " * 31, 30, "no room there for more than the 30 tokens that windows share"),
    ],
)
def test_a_text_whose_windows_have_no_room_for_more_than_they_share_is_refused(
    text: Any, stride: int, said: str, tokenizer: Any, classifier: Any
) -> None:
    with pytest.raises(TooLongError, match=rf"text 1, .*(film ){{10}}.*, .*{said}"):
        encode(tokenizer, ["a film", text], classifier, stride)
    if stride:
        assert len(encode(tokenizer, [text], classifier, stride - 1)) > 1


@pytest.mark.parametrize(("question", "room", "stride"), [(13, 16, 8), (14, 15, 7), (25, 4, 2), (27, 2, 1), (28, 1, 0)])
def test_where_a_long_first_part_leaves_little_room_windows_share_half_of_it(
    question: int, room: int, stride: int, tokenizer: Any, classifier: Any
) -> None:
    text = ("film " * question, "king " * 40)
    examples = encode(tokenizer, [text], classifier)
    pieces = [window.piece for window in examples.windows or ()]
    assert {len(piece) for piece in pieces[:-1]} == {room}
    assert {len(set(one) & set(other)) for one, other in pairwise(pieces)} == {stride}
    assert {token for piece in pieces for token in piece} == set(range(question + 2, question + 42))
    assert examples.windows == encode(tokenizer, [text], classifier, stride).windows


def test_a_first_part_that_leaves_no_room_at_all_is_refused_and_named(tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(TooLongError, match=r"text 1, .*film film.*, has 72 tokens .*; shorten the first part$"):
        encode(tokenizer, ["a film", ("film " * 29, "king " * 40)], classifier)


def test_a_long_first_part_is_no_matter_where_the_pair_fits(tokenizer: Any, classifier: Any) -> None:
    assert encode(tokenizer, [("film " * 27, "a cat")], classifier).windows is None


@pytest.mark.parametrize(("stride", "error"), [(-1, ValueError), (2.0, TypeError), ("8", TypeError), (True, TypeError)])
def test_a_stride_that_is_no_number_of_tokens_is_refused(
    stride: Any, error: type[Exception], tokenizer: Any, classifier: Any
) -> None:
    with pytest.raises(error, match="stride"):
        encode(tokenizer, ["a film"], classifier, stride)


def test_a_model_for_long_texts_takes_them_in_one_piece(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    model = transformers.ModernBertForQuestionAnswering(config)
    larger = copy.deepcopy(tokenizer)
    larger.model_max_length = 8192
    whole = encode(larger, [("who was king ?", "film " * 8000)], model)
    assert whole.windows is None and whole.lengths == [8007]
    assert encode(larger, [("who was king ?", "film " * 9000)], model).lengths == [8192, 9000 - (8192 - 7) + 128 + 7]


def test_the_shorter_of_the_tokenizers_and_the_models_limit_counts(tokenizer: Any, tiny_bert: Any) -> None:
    assert length_limit(tokenizer, tiny_bert()) == 32
    config = type("Config", (), {"max_position_embeddings": 20})
    assert length_limit(tokenizer, type("Model", (), {"config": config})) == 20
    assert length_limit(tokenizer, object()) == 32


@pytest.mark.parametrize("text", ["", "  \n", ("", "a film"), ("who?", " ")])
def test_an_empty_text_is_named_and_refused(text: Any, tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(ValueError, match="text 1 is empty: leave it out"):
        encode(tokenizer, ["a film", text], classifier)


@pytest.mark.parametrize("text", ["\u200b", "\x01", ("who?", "\u200b")])
def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused(text: Any, tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(ValueError, match="text 1 is empty: the tokenizer finds nothing in"):
        encode(tokenizer, ["a film", text], classifier)


def test_no_text_at_all_is_refused(tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(ValueError, match="texts is empty: give at least one"):
        encode(tokenizer, [], classifier)


@pytest.mark.parametrize("text", [None, 3, b"a film", ("a", "b", "c"), ("a",), ("a", 3), ()])
def test_what_is_neither_text_nor_pair_is_refused(text: Any, tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(TypeError, match="text 1: expected a text or a pair of texts, got "):
        encode(tokenizer, ["a film", text], classifier)


@pytest.mark.parametrize("texts", ["a film", None, 3, {"a film"}])
def test_texts_that_are_no_list_are_refused(texts: Any, tokenizer: Any, classifier: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a list of texts or of pairs, got {type(texts).__name__}"):
        encode(tokenizer, texts, classifier)


def test_a_span_is_described_by_its_slice_of_the_text(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, PAIRS, classifier)
    tokens = examples.tokens[0]
    first, last = tokens.index("king", tokens.index("[SEP]")), tokens.index("münchen")
    assert examples.describe(0, (first, last)) == "king walked in münchen"
    assert examples.describe(1, [examples.tokens[1].index("東"), examples.tokens[1].index("京")]) == "東京"


def test_a_span_keeps_the_case_and_spaces_of_the_text(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, [("Who?", "The  OLD\tKing")], classifier)
    start = examples.tokens[0].index("the")
    assert examples.describe(0, (start, start + 2)) == "The  OLD\tKing"


@pytest.mark.parametrize("answer", [(0, 0), (1, 5), (1, 7), (6, 8)])
def test_a_span_that_is_not_in_one_text_is_said_to_be_none(
    answer: tuple[int, int], tokenizer: Any, classifier: Any
) -> None:
    examples = encode(tokenizer, [("who was king?", "the king")], classifier)
    assert examples.describe(0, answer) == "(no span)"


def test_a_class_is_described_by_its_label(tokenizer: Any, classifier: Any) -> None:
    assert encode(tokenizer, ["a film"], classifier).describe(0, [2]) == "so so"


def test_select_takes_the_examples_in_the_order_asked_for(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, ["a film", ("who?", "the king"), "paris"], classifier)
    chosen = examples.select([2, 1])
    assert chosen.tokens == [examples.tokens[2], examples.tokens[1]]
    assert chosen.segments == [examples.segments[2], examples.segments[1]]
    assert [chosen[0], chosen[1]] == [examples[2], examples[1]]
    assert chosen.describe(1, (4, 5)) == examples.describe(1, (4, 5)) == "the king"
    assert chosen.collate([chosen[0]])["input_ids"].tolist() == [examples[2]["input_ids"]]


def test_windows_are_selected_with_their_examples(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, ["a film", *LONG], classifier)
    assert examples.windows is not None
    chosen = examples.select([3, 0, 2]).select([2, 0])
    assert chosen.windows == [examples.windows[2], examples.windows[3]]
    assert chosen.tokens == [examples.tokens[2], examples.tokens[3]]


def test_a_selection_of_a_selection_still_describes_the_right_text() -> None:
    assert ragged().select([2, 0, 1]).select([1, 2]).describe(0, [7]) == "0:7"


def test_batches_hold_every_example_once_and_similar_lengths_together() -> None:
    lengths = torch.randint(1, 50, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [["x"] * n for n in lengths]
    examples = Examples([{"input_ids": [0] * n} for n in lengths], tokens, [[1] * n for n in lengths], lambda i, a: "")
    batches = examples.batches(8)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]
    assert sorted(i for batch in batches for i in batch) == list(range(37))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_batches_hold_every_window_once(tokenizer: Any, classifier: Any) -> None:
    examples = encode(tokenizer, ["a film", *LONG], classifier)
    batches = examples.batches(3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert len(examples) > len(LONG) + 1


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"the batch size is {size}; expected 1 or more"):
        ragged().batches(size)


@pytest.mark.parametrize("with_mask", [True, False])
def test_corrupted_texts_have_other_tokens_in_the_places_drawn_and_nothing_else(
    with_mask: bool, tokenizer: Any, classifier: Any
) -> None:
    examples = encode(tokenizer, [*PAIRS, LONG[1]] * 20, classifier)
    assert examples.mask_token == tokenizer.mask_token_id
    before = copy.deepcopy(examples.inputs)
    rows = [(item["input_ids"], where) for item, where in zip(before, examples.segments, strict=True)]
    allowed = {number for row, where in rows for number, segment in zip(row, where, strict=True) if segment}
    if with_mask:
        allowed = {tokenizer.mask_token_id}
    else:
        examples = replace(examples, mask_token=None)
    corrupted = examples.corrupted(0.3, seed=1)
    places = changed = 0
    for old, new, (row, where) in zip(before, corrupted.inputs, rows, strict=True):
        assert {name for name in old if old[name] != new[name]} <= {"input_ids"}
        for a, b, segment in zip(row, new["input_ids"], where, strict=True):
            assert a == b or (segment and b in allowed)
            places, changed = places + (segment != 0), changed + (a != b)
    assert 0.24 < changed / places < 0.36  # a word is now and then drawn for its own place
    assert examples.inputs == before and corrupted.tokens == examples.tokens
    assert examples.corrupted(0.3, seed=1).inputs == corrupted.inputs != examples.corrupted(0.3, seed=2).inputs
    assert examples.corrupted(0).inputs == before
    assert examples.select([2, 0]).mask_token == examples.mask_token


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_to_corrupt_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share is {share!r}; expected a number from 0 to 1"):
        ragged().corrupted(share)


def test_what_is_no_text_or_marks_its_places_by_tokens_is_not_corrupted() -> None:
    examples = ragged()
    with pytest.raises(ValueError, match="no texts: expected a recipe with corrupted=0"):
        replace(examples, inputs=[{"pixel_values": [0.0]}] * 3).corrupted(0.1)
    with pytest.raises(ValueError, match="asked at places that their tokens mark: expected a recipe with corrupted=0"):
        replace(examples, kind=AtPositions("last")).corrupted(0.1)
