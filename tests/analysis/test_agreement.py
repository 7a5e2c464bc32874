from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
from token_lists import single

from diffmask_fast.analysis.agreement import agreement

TEXTS = [single("a b c d e"), single("f g"), single("h i j k")]


def plain_spearman(x: list[float], y: list[float]) -> float:
    """By the definition: the correlation of ranks, ties sharing the mean of theirs."""

    def ranks(values: list[float]) -> list[float]:
        ordered = sorted(values)
        return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]

    a, b = ranks(x), ranks(y)
    mean = (len(x) - 1) / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))


def test_runs_agree_as_a_plain_spelling_says(make: Any) -> None:
    runs = [make(TEXTS, seed=seed) for seed in range(3)]
    runs[1].keep[2] = runs[1].keep[3]  # ties
    found = agreement(runs)
    assert found.pairs == 3 and found.defined.tolist() == [1.0] * 3
    for site in range(3):
        spearman, jaccard, same = [], [], []
        for one, other in combinations(runs, 2):
            for a, b in zip(one, other, strict=True):
                x, y = a.keep[:, site].tolist(), b.keep[:, site].tolist()
                spearman.append(plain_spearman(x, y))
                kept = [{i for i, value in enumerate(values) if value > 0.5} for values in (x, y)]
                union = kept[0] | kept[1]
                jaccard.append(len(kept[0] & kept[1]) / len(union) if union else 1.0)
                same.append(1 - len(kept[0] ^ kept[1]) / len(x))
        for values, mine in ((spearman, found.spearman), (jaccard, found.jaccard), (same, found.same)):
            # float64, sums of nine
            assert mine[site].item() == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_a_run_agrees_with_itself(make: Any) -> None:
    found = agreement([make(TEXTS), make(TEXTS)])
    for values in (found.spearman, found.jaccard, found.same):
        assert values.tolist() == pytest.approx([1.0] * 3, rel=1e-12)


def test_ranks_that_do_not_exist_are_left_out_and_counted(make: Any) -> None:
    keep = [[0.0, 0.25], [0.0, 0.5], [0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]
    texts = [[("a", 1), ("b", 1)], [("c", 1), ("d", 1), ("e", 1)]]
    found = agreement([make(texts, keep), make(texts, keep)])
    assert found.defined.tolist() == [0.5, 0.5] and found.spearman.tolist() == pytest.approx([1.0, 1.0])
    nothing = [[0.0, 0.0]] * 5
    found = agreement([make(texts, nothing), make(texts, nothing)])
    assert found.defined.tolist() == [0.0, 0.0] and all(math.isnan(value) for value in found.spearman.tolist())
    assert found.jaccard.tolist() == [1.0, 1.0]  # both keep nothing


@pytest.mark.parametrize(
    ("other", "fields", "message"),
    [
        (TEXTS[:2], {}, "run 1 has 2 texts and run 0 3"),
        (
            [TEXTS[0], single("f x"), TEXTS[2]],
            {},
            r"text 1 of run 1 begins with \[CLS\] f x",
        ),
        (TEXTS, {"site_names": ("embedding", "middle", "last")}, "run 1 has the sites embedding, middle, last"),
    ],
)
def test_runs_on_other_texts_or_sites_are_refused(other: list, fields: dict, message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        agreement([make(TEXTS), make(other, **fields)])


def test_one_run_can_not_agree(make: Any) -> None:
    with pytest.raises(ValueError, match="got 1 runs: give at least two"):
        agreement([make(TEXTS)])
