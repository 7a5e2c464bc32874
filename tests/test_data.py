from __future__ import annotations

from typing import Any

import pytest
import torch

from diffmask_fast.data import Examples, TooLongError, encode, length_limit

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


def test_a_text_that_is_too_long_is_refused_with_both_numbers(tokenizer: Any, classifier: Any) -> None:
    longest = ["film " * 30]  # 30 tokens, [CLS] and [SEP]: just what the model takes
    assert encode(tokenizer, longest, classifier).lengths == [32]
    with pytest.raises(TooLongError, match="text 1 has 33 tokens and the model takes 32: shorten or split it"):
        encode(tokenizer, ["a film", "film " * 31], classifier)


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


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"the batch size is {size}; expected 1 or more"):
        ragged().batches(size)
