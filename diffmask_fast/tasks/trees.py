"""Sentences with sentiment labels, read from the trees of the Stanford Sentiment Treebank (Socher et al. 2013).

One tree a line, in brackets as the Penn Treebank writes them; each node has a label from 0 (very negative) to 4 (very
positive): `(4 (2 a) (4 (4 fine) (2 film)))`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

LABELS = "01234"
NEUTRAL = 2
CLASS_NAMES = {5: ("very negative", "negative", "neutral", "positive", "very positive"), 2: ("negative", "positive")}
ESCAPES = {
    **{"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"},
    **{r"\/": "/", r"\*": "*"},
}
_ESCAPE = re.compile("|".join(map(re.escape, ESCAPES)))
_PIECE = re.compile(r"[()]|[^() \t\r\n]+")  # a word may hold other spaces: "8\xa01/2" is one


@dataclass(frozen=True)
class Sentence:
    """A tree without its inner nodes.

    Attributes:
        words: the leaves.
        label: of the whole sentence, a class.
        word_labels: of each leaf, 0 to 4.
    """

    words: tuple[str, ...]
    label: int
    word_labels: tuple[int, ...]

    @property
    def text(self) -> str:
        """The words with one space between them."""
        return " ".join(self.words)


def read_trees(path: str | os.PathLike[str]) -> list[Sentence]:
    """The sentences of a file of trees, with the labels 0 to 4; blank lines count as lines only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no such tree, with its number; a file that isn't text; no tree at all.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file; expected a file of trees, one a line")
    sentences = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        sentences.append(parse_tree(line))
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {number}: {error}; expected a tree such as (4 (2 a) (4 (4 fine) (2 film)))"
                    ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); expected a file of trees, one a line") from error
    if not sentences:
        raise ValueError(f"{path} holds no tree")
    return sentences


def parse_tree(line: str) -> Sentence:
    """One tree.

    Raises:
        ValueError: what is wrong with it.
    """
    words: list[str] = []
    labels: list[int] = []
    above: list[list[str]] = []  # the open nodes: a label, and "word" or "tree" for what they hold
    root = None
    for piece in _PIECE.findall(line):
        if root is not None:
            raise ValueError(f"{shown(piece)} follows the end of the tree")
        if piece == "(":
            if above:
                _hold(above[-1], "tree", piece)
            above.append([])
        elif not above:
            raise ValueError(f"it begins with {shown(piece)}")
        elif piece == ")":
            node = above.pop()
            if len(node) < 2:
                raise ValueError("there is nothing but a label in a bracket" if node else "a bracket is empty")
            root = None if above else int(node[0])
        elif not above[-1]:
            if piece not in tuple(LABELS):
                raise ValueError(f"the label {shown(piece)} is none of 0 to 4")
            above[-1].append(piece)
        else:
            _hold(above[-1], "word", piece)
            words.append(_ESCAPE.sub(lambda found: ESCAPES[found.group()], piece))
            labels.append(int(above[-1][0]))
    if root is None:
        raise ValueError(f"it ends with {len(above)} open bracket{'s' if len(above) > 1 else ''}")
    return Sentence(tuple(words), root, tuple(labels))


def _hold(node: list[str], kind: str, piece: str) -> None:
    """Note that a node holds trees, or one word."""
    if not node:
        raise ValueError(f"{shown(piece)} stands where a label is expected")
    if len(node) == 1:
        node.append(kind)
    elif not node[1] == kind == "tree":
        raise ValueError(f"{shown(piece)} stands beside a {node[1]} in one bracket")


def shown(piece: str) -> str:
    return repr(piece if len(piece) <= 30 else f"{piece[:30]}...")


def in_classes(sentences: Sequence[Sentence], classes: int) -> list[Sentence]:
    """The sentences with their labels in 5 classes, as they are, or in 2: negative 0 and positive 1, without the
    neutral sentences. Words keep their labels.

    Raises:
        ValueError: another number of classes; no sentence is left.
    """
    if classes not in CLASS_NAMES:
        raise ValueError(f"classes is {classes!r}; expected 5, or 2 (without the neutral sentences)")
    if classes == 5:
        return list(sentences)
    chosen = [Sentence(s.words, int(s.label > NEUTRAL), s.word_labels) for s in sentences if s.label != NEUTRAL]
    if not chosen:
        raise ValueError(f"all {len(sentences)} sentences are neutral: none is left for 2 classes")
    return chosen
