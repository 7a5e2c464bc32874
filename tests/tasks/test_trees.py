from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffmask_fast.tasks.trees import CLASS_NAMES, Sentence, in_classes, parse_tree, read_trees

FINE = "(4 (2 a) (4 (4 fine) (2 film)))"
DULL = "(0 (2 (2 a) (1 dull)) (2 film))"
PLAIN = "(2 (2 the) (2 film))"


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "trees.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_tree_becomes_its_words_with_the_label_of_the_root_and_of_each_leaf() -> None:
    assert parse_tree(FINE) == Sentence(("a", "fine", "film"), 4, (2, 4, 2))
    assert parse_tree(DULL) == Sentence(("a", "dull", "film"), 0, (2, 1, 2))
    assert parse_tree("(3 good)") == Sentence(("good",), 3, (3,))
    assert parse_tree(FINE).text == "a fine film"


def test_a_file_has_one_tree_a_line_whatever_its_line_ends_and_blank_lines(tmp_path: Path) -> None:
    for text in (f"{FINE}\n{DULL}\n", f"{FINE}\n{DULL}", f"{FINE}\r\n\r\n  {DULL} \r\n"):
        assert read_trees(written(tmp_path, text)) == [parse_tree(FINE), parse_tree(DULL)]


def test_nodes_may_have_any_number_of_children_and_any_depth() -> None:
    assert parse_tree("(1 (2 a) (2 b) (2 c))").words == ("a", "b", "c")
    deep = 100_000
    assert parse_tree("(2 " * deep + "(4 film)" + ")" * deep) == Sentence(("film",), 2, (4,))


@pytest.mark.parametrize(
    ("leaf", "word"),
    [
        ("-LRB-", "("), ("-RRB-", ")"), ("-LSB-", "["), ("-RSB-", "]"), ("-LCB-", "{"), ("-RCB-", "}"),
        (r"9\/11", "9/11"), (r"f\*\*k", "f**k"), ("8\xa01\\/2", "8\xa01/2"), ("``", "``"), ("münchen", "münchen"),
        (":-RRB-", ":)"),
    ],
)  # fmt: skip
def test_what_the_penn_treebank_escapes_comes_back_as_it_was_and_the_rest_stays(leaf: str, word: str) -> None:
    assert parse_tree(f"(2 (2 {leaf}) (2 x))").words == (word, "x")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("a fine film", "it begins with 'a'"),
        ("4\ta fine film", "it begins with '4'"),
        (FINE[:-1], "it ends with 1 open bracket"),
        (FINE[:-2], "it ends with 2 open brackets"),
        (f"{FINE})", "')' follows the end"),
        (f"{FINE} {DULL}", "'(' follows the end"),
        ("(4 a fine)", "'fine' stands beside a word"),
        ("(4 a (2 fine))", "'(' stands beside a word"),
        ("(4 (2 a) fine)", "'fine' stands beside a tree"),
        ("(5 film)", "the label '5' is none of 0 to 4"),
        ("(-1 film)", "the label '-1' is none"),
        ("(01 film)", "the label '01' is none"),
        ("(NP (DT the) (NN film))", "the label 'NP' is none"),
        ("((2 film))", r"'(' stands where a label is expected"),
        ("(2)", "nothing but a label"),
        ("(2 (2 a) ())", "a bracket is empty"),
        ('{"label": 2}', "it begins with '{\"label\":'"),
        ("x" * 1000, f"it begins with '{'x' * 30}...'"),
    ],
)
def test_a_broken_line_is_one_line_of_error_with_the_file_and_the_number(line: str, wrong: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"{FINE}\n\n{line}\n{DULL}\n")
    with pytest.raises(ValueError, match=re.escape(wrong)) as caught:
        read_trees(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and "expected a tree such as (4 " in message and "\n" not in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_tree_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trees\.txt holds no tree"):
        read_trees(written(tmp_path, content))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trees\.txt is not text .*; expected a file of trees"):
        read_trees(written(tmp_path, b"\xff\xfe\x00\x01"))


def test_a_missing_file_is_named_and_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: there is no such file"):
        read_trees(tmp_path / "nothing.txt")
    with pytest.raises(OSError, match=str(tmp_path)):
        read_trees(tmp_path)


def test_two_classes_leave_the_neutral_sentences_out_and_keep_the_labels_of_the_words() -> None:
    trees = [parse_tree(f"({label} (2 a) (3 {label}))") for label in (0, 1, 2, 3, 4)]
    assert in_classes(trees, 5) == trees
    two = in_classes(trees, 2)
    assert [(s.words[1], s.label) for s in two] == [("0", 0), ("1", 0), ("3", 1), ("4", 1)]
    assert all(s.word_labels == (2, 3) for s in two)
    assert all(len(names) == classes for classes, names in CLASS_NAMES.items())


def test_nothing_but_neutral_sentences_can_not_be_two_classes() -> None:
    with pytest.raises(ValueError, match="all 1 sentences are neutral"):
        in_classes([parse_tree(PLAIN)], 2)


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="classes is 3; expected 5, or 2"):
        in_classes([parse_tree(PLAIN)], 3)


@pytest.mark.shared
def test_the_treebank_is_read_whole(shared: Path) -> None:
    train, dev = (read_trees(shared / "data" / "sst" / f"{name}.txt") for name in ("train", "dev"))
    assert (len(train), len(dev)) == (8544, 1101)
    # the sizes of the binary task, as everybody who uses the treebank reports them
    assert (len(in_classes(train, 2)), len(in_classes(dev, 2))) == (6920, 872)
    assert {len(s.words) - len(s.word_labels) for s in (*train, *dev)} == {0}
    words = {word for s in (*train, *dev) for word in s.words}
    assert not any("-LRB-" in word or "\\" in word for word in words) and "(" in words
