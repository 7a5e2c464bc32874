"""Texts as lists of (token, segment)."""

from __future__ import annotations


def single(words: str) -> list[tuple[str, int]]:
    """The tokens of a text between [CLS] and [SEP]."""
    return [("[CLS]", 0), *((word, 1) for word in words.split()), ("[SEP]", 0)]


def pair(question: str, passage: str) -> list[tuple[str, int]]:
    return [*single(question), *((word, 2) for word in passage.split()), ("[SEP]", 0)]
