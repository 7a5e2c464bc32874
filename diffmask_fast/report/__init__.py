"""Looking at attributions: in the terminal, as a figure for print, as a page for the browser.

`terminal` needs rich, `figure` needs matplotlib, `html` nothing; each is imported only when it is used.
"""

from __future__ import annotations

from diffmask_fast.attribution import Attribution, Attributions


def printable(text: str) -> str:
    """`text` with control characters, newlines and direction overrides spelled out, as `\\x1b` or `\\u202e`.

    Tokens come from anywhere: one of them must not be able to steer the terminal or reorder the line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def piece(token: str) -> tuple[bool, str]:
    """Whether a token continues the word before it (WordPiece's `##`), and its text without that mark."""
    continues = token.startswith("##") and len(token) > 2
    return continues, token[2:] if continues else token


WORD_BEGINS = ("Ġ", "▁")  # byte-level BPE, and SentencePiece


def marks_beginnings(attribution: Attribution) -> bool:
    """Whether the tokens are those of a tokenizer that marks where words begin, and not where they go on."""
    tokens = attribution.tokens
    return any(token.startswith(WORD_BEGINS) for token in tokens) and not any(piece(token)[0] for token in tokens)


def pieces(attribution: Attribution) -> list[tuple[bool, str]]:
    """`piece` of each token, by the marks that this text has: some tokenizers mark what begins a word instead."""
    if not marks_beginnings(attribution):
        return [piece(token) for token in attribution.tokens]
    shown, special_before = [], True
    for token, segment in zip(attribution.tokens, attribution.segments.tolist(), strict=True):
        begins = token.startswith(WORD_BEGINS) or special_before or segment == 0
        shown.append((not begins, without_mark(token)))
        special_before = segment == 0
    return shown


def without_mark(token: str) -> str:
    """A token without what says that it begins a word; the mark alone is left as it is."""
    return token[1:] if len(token) > 1 and token.startswith(WORD_BEGINS) else token


def has_two_segments(attributions: Attributions) -> bool:
    return bool((attributions.segments == 2).any())


def require_one(attribution: Attribution) -> None:
    if not isinstance(attribution, Attribution):
        raise TypeError(
            f"expected an Attribution, which is one text, got {type(attribution).__name__}; "
            "index it first, as in attributions[0]"
        )


def require_many(attributions: Attributions) -> None:
    if not isinstance(attributions, Attributions):
        raise TypeError(f"expected Attributions, got {type(attributions).__name__}; slice it, as in attributions[:1]")
    if not len(attributions):
        raise ValueError("expected at least one text, got none")
