from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from token_lists import pair, single

from diffmask_fast.analysis import words
from diffmask_fast.analysis.words import located, parts_of_speech, rebuilt, spread, word_labels

PAIRS = [("Who  was king?", "The old king walked, building in München."), ("what is red ?", "a red house")]


class Tagger:
    """Tags words of letters by their length, and all else as PUNCT, in what spaCy calls a document."""

    def pipe(self, texts: list[str]) -> Any:
        for text in texts:
            found, at = [], 0
            for word in text.replace(",", " ,").replace(".", " .").replace("?", " ?").split():
                at = text.index(word, at)
                found.append(SimpleNamespace(text=word, idx=at, pos_=f"W{len(word)}" if word.isalpha() else "PUNCT"))
                at += len(word)
            yield Document(text, found)


class Document(list):
    def __init__(self, text: str, found: list) -> None:
        super().__init__(found)
        self.text = text


def of_pairs(make: Any, tokenizer: Any) -> Any:
    texts = []
    for question, passage in PAIRS:
        encoding = tokenizer(question, passage)
        kinds = [0 if part is None else part + 1 for part in encoding.sequence_ids()]
        texts.append(list(zip(tokenizer.convert_ids_to_tokens(encoding["input_ids"]), kinds, strict=True)))
    return make(texts)


def test_a_token_stands_where_its_characters_are(make: Any, tokenizer: Any) -> None:
    attributions = of_pairs(make, tokenizer)
    flat = [token for tokens in attributions.tokens for token in tokens]
    parts = located(attributions, PAIRS, tokenizer)
    assert [(part.number, part.segment, part.text) for part in parts] == [
        (i, side + 1, PAIRS[i][side]) for i in range(2) for side in range(2)
    ]
    for part in parts:
        for row, (begin, end) in zip(part.rows, part.spans, strict=True):
            if flat[row] != "[UNK]":
                assert part.text[begin:end].lower() == flat[row].removeprefix("##")
            assert attributions.segments[row] == part.segment
    told = sorted(row for part in parts for row in part.rows)
    assert told == attributions.segments.nonzero().flatten().tolist()


def test_word_pieces_have_the_tag_of_their_word_and_special_tokens_their_own_name(make: Any, tokenizer: Any) -> None:
    attributions = of_pairs(make, tokenizer)
    tags = parts_of_speech(attributions, located(attributions, PAIRS, tokenizer), Tagger())
    flat = [token for tokens in attributions.tokens for token in tokens]
    said = dict(zip(flat, tags, strict=True))
    assert said["[CLS]"] == "[CLS]" and said["[SEP]"] == "[SEP]"
    assert said["build"] == said["##ing"] == "W8"
    assert said["walk"] == said["##ed"] == "W6" and said["münchen"] == "W7"
    assert said[","] == said["."] == said["?"] == "PUNCT"
    assert None not in tags


def test_words_rebuilt_from_word_pieces_are_the_words(make: Any) -> None:
    parts = rebuilt(make([pair("who walk ##ed ?", "build ##ing ##s , ##")]))
    assert [part.text for part in parts] == ["who walked ?", "buildings , ##"]
    assert parts[1].rows == [6, 7, 8, 9, 10]
    assert parts[1].spans == [(0, 5), (5, 8), (8, 9), (10, 11), (12, 14)]


def test_words_rebuilt_from_sentence_pieces_are_the_words(make: Any) -> None:
    (part,) = rebuilt(make([[("<s>", 0), ("▁the", 1), ("▁un", 1), ("seen", 1), (".", 1)]]))
    assert part.text == "the unseen." and part.spans == [(0, 3), (4, 6), (6, 10), (10, 11)]


def test_byte_level_tokens_are_not_guessed_at(make: Any) -> None:
    with pytest.raises(ValueError, match="byte-level tokenizer: give the texts"):
        rebuilt(make([single("the Ġcat")]))


def test_a_token_over_several_stretches_belongs_to_the_one_it_shares_most_with(make: Any) -> None:
    attributions = make([[("a", 1), ("b", 1), ("c", 1), ("d", 1)]])
    part = words.Part(0, 1, "0123456789ab", [0, 1, 2, 3], [(0, 3), (3, 7), (7, 9), (10, 12)])
    stretches = [(0, 4, "x"), (4, 8, "y"), (8, 10, "z")]
    # 3 of x; 1 of x and 3 of y; 1 of y and 1 of z; none
    assert spread(attributions, [part], [stretches]) == ["x", "y", "y", None]


def test_labels_of_words_go_to_their_pieces(make: Any, tokenizer: Any) -> None:
    attributions = make([single("a fine build ##ing"), single("dull")])
    parts = located(attributions, ["a fine building", "dull"], tokenizer)
    labels = word_labels(attributions, parts, [["a", "fine", "building"], ["dull"]], [[2, 4, 3], [0]])
    assert labels == ["[CLS]", 2, 4, 3, 3, "[SEP]", "[CLS]", 0, "[SEP]"]


@pytest.mark.parametrize(
    ("said", "labels", "message"),
    [
        ([["a", "film"]], [[1, 2]], r"text 0 has no word 'film' at character 1: ' fine'"),
        ([["fine"]], [[1]], r"text 0 has no word 'fine' at character 0"),  # "a" would be left without a label
        ([["a", "fine"]], [[1]], "text 0 has 2 words and 1 labels"),
        ([["a"], ["b"]], [[1], [2]], "words of 2 texts"),
    ],
)
def test_labels_that_do_not_fit_the_words_are_refused(
    said: list, labels: list, message: str, make: Any, tokenizer: Any
) -> None:
    attributions = make([single("a fine")])
    with pytest.raises(ValueError, match=message):
        word_labels(attributions, located(attributions, ["a fine"], tokenizer), said, labels)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a fine film", "dull", "dull"], "got 3 texts and attributions of 2"),
        (["a fine film", "old"], "text 1 has other tokens than its attribution: token 1 is 'old' and 'dull' there"),
        (["a fine", "dull"], r"text 0 .*: token 3 is '\[SEP\]' and 'film' there"),
        (["a fine film 1", "dull"], r"text 0 .*: token 4 is '1' and '\[SEP\]' there"),
    ],
)
def test_other_texts_than_those_attributed_are_refused(texts: list, message: str, make: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        located(make([single("a fine film"), single("dull")]), texts, tokenizer)


def test_without_spacy_or_its_pipeline_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy")
    monkeypatch.setattr(words, "TAGGERS", ("no_such_pipeline",))
    with pytest.raises(ImportError, match="python -m spacy download no_such_pipeline"):
        words.load_tagger()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install"):
        words.load_tagger()


def test_spacy_tags_the_words_of_a_real_sentence(make: Any) -> None:
    spacy = pytest.importorskip("spacy")
    if not any(spacy.util.is_package(name) for name in words.TAGGERS):
        pytest.skip(f"none of {words.TAGGERS} is installed")
    attributions = make([single("the old king walk ##ed in paris .")])
    tags = parts_of_speech(attributions, rebuilt(attributions))
    assert tags[1:5] == ["DET", "ADJ", "NOUN", "VERB"] and tags[5] == "VERB" and tags[8] == "PUNCT"
