from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from token_lists import pair, single

from diffmask_fast.analysis.groups import kept_sites, largest_first, segment_regions, shares

KEEP = [[1.0, 0.75], [0.5, 0.25], [0.75, 0.0], [1.0, 1.0], [0.25, 0.25]]  # of "a b a" and "a b", exact in float32


def test_the_sites_of_a_group_are_counted_by_hand(make: Any) -> None:
    attributions = make([[("a", 1), ("b", 1), ("a", 1)], [("a", 1), ("b", 1)]], KEEP)
    a, b = kept_sites(attributions, ["A", "B", "A", "A", "B"])
    assert (a.name, a.tokens, a.texts) == ("A", 3, 2) and (b.name, b.tokens, b.texts) == ("B", 2, 2)
    assert a.expected == pytest.approx((1.75 + 0.75 + 2) / 3) and b.expected == pytest.approx((0.75 + 0.5) / 2)
    assert a.kept == pytest.approx((2 + 1 + 2) / 3) and b.kept == 0  # 0.5 itself is dropped
    # text 0 holds 1.75 + 0.75 and text 1 holds 2: their distances from two and one times the mean of 1.5
    assert a.expected_error == pytest.approx(math.sqrt(2 * (0.5**2 + 0.5**2)) / 3)


def test_the_standard_error_is_the_usual_one_where_each_text_has_one_token_of_the_group(make: Any) -> None:
    texts = [single("a"), single("a b"), single("b"), single("a")]
    attributions = make(texts)
    labels = [token for text in texts for token, _ in text]
    values = torch.stack([text.keep[0].double().sum() for text in attributions])
    (first,) = (group for group in kept_sites(attributions, labels) if group.name == "[CLS]")
    assert first.expected == pytest.approx(values.mean().item())
    assert first.expected_error == pytest.approx((values.std() / 2).item())


def test_groups_come_in_order_and_tokens_without_a_label_are_left_out(make: Any) -> None:
    attributions = make([[("a", 1), ("b", 1), ("a", 1)], [("a", 1), ("b", 1)]], KEEP)
    groups = kept_sites(attributions, [None, 1, 2, None, 1])
    assert [(group.name, group.tokens) for group in groups] == [("2", 1), ("1", 2)]
    assert groups[0].expected_error is None  # one text says nothing about others


@pytest.mark.parametrize(("labels", "message"), [(["A"], "got 1 labels and 3 tokens"), ([None] * 3, "no token has")])
def test_labels_that_do_not_fit_are_refused(labels: list, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        kept_sites(make([single("a")]), labels)


def test_regions_are_averaged_over_their_tokens_and_then_over_texts(make: Any) -> None:
    attributions = make([pair("who", "a b c d"), pair("what is", "red")])
    answer = torch.zeros(len(attributions.keep), dtype=torch.bool)
    answer[[4, 5, 12]] = True  # "b c" and "red"
    found = {share.name: share for share in shares(attributions, segment_regions(attributions, answer, [True, False]))}
    assert set(found) == {"special", "question", "passage", "answer", "answer, model right", "answer, model wrong"}

    def plain(tokens: list[list[int]], site: int, threshold: bool) -> float:
        means = []
        for rows in tokens:
            values = [attributions.keep[row, site].item() for row in rows]
            means.append(sum(value > 0.5 if threshold else value for value in values) / len(values))
        return sum(means) / len(means)

    wanted = {
        "question": [[1], [9, 10]],
        "passage": [[3, 4, 5, 6], [12]],
        "answer": [[4, 5], [12]],
        "answer, model right": [[4, 5]],
        "answer, model wrong": [[12]],
    }
    for name, rows in wanted.items():
        assert found[name].texts == len(rows)
        for site in range(3):
            # one rounding to float32
            assert found[name].expected[site].item() == pytest.approx(plain(rows, site, False), rel=1e-6)
            assert found[name].kept[site].item() == pytest.approx(plain(rows, site, True), rel=1e-6)


def test_a_region_that_no_text_has_is_left_out(make: Any) -> None:
    attributions = make([single("a b")])
    assert [share.name for share in shares(attributions, segment_regions(attributions))] == ["special", "text"]


def test_regions_that_do_not_fit_are_refused(make: Any) -> None:
    attributions = make([single("a b")])
    with pytest.raises(ValueError, match=r"region x: expected torch.bool \(4,\)"):
        shares(attributions, {"x": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="right has 2 entries for 1 texts"):
        segment_regions(attributions, torch.zeros(4, dtype=torch.bool), [True, True])


def test_the_first_token_is_the_largest_only_where_no_other_has_as_much(make: Any) -> None:
    keep = [[0.9, 0.5], [0.8, 0.5], [0.2, 0.75], [0.1, 0.6]]
    attributions = make([[("[CLS]", 0), ("a", 1)], [("[CLS]", 0), ("b", 1)]], keep)
    assert largest_first(attributions).tolist() == [1.0, 0.5]
    assert largest_first(make([[("[CLS]", 0)]], [[0.0, 0.1]])).tolist() == [1.0, 1.0]
