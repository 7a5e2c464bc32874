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
