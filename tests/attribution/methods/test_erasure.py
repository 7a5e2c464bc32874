from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.result import Attribution
from diffmask_fast.data import encode
from diffmask_fast.moments import Moments, state_moments
from diffmask_fast.sites import patch

TEXTS = [
    "dull",
    "a dog",
    "münchen is blue",
    "the red fish played",
    "who was building the house",
    "is the bird in the green tree",
    "where in the city was the 東 ?",
    "the old river was in a new dull film .",  # 12 tokens with [CLS] and [SEP]
]
PAIRS = [("who", "the red king is"), ("when ?", "a dull year"), ("where is rome", "in the")]
SITES = {"embedding": 0, "layer 1": 2}
TOLERANCES = [None, 0.01]
# The search does not tell apart what is closer than 1e-5; the rest is for rounding: a divergence is the sum of a few
# float32 terms, each of them a probability times a difference of logits that came out of some forty operations.
CLOSE = 2e-5

Subset = tuple[int, ...]
Truth = dict[Subset, tuple[float, bool]]  # of every subset its divergence, and whether the answer is the same


@pytest.fixture(scope="module")
def five_classes(tiny_bert: Any) -> Any:
    return tiny_bert(num_labels=5)


@pytest.fixture(scope="module")
def moments(five_classes: Any, tokenizer: Any) -> dict[int, Moments]:
    return state_moments(five_classes, encode(tokenizer, TEXTS, five_classes))


@torch.no_grad()
def brute_force(model: Any, inputs: dict[str, Tensor], site: int, baseline: Tensor, passage: list[int]) -> Truth:
    """All subsets of one text, by runs of the whole model."""
    length = inputs["input_ids"].shape[1]
    subsets = [subset for size in range(length + 1) for subset in combinations(range(length), size)]
    kept = torch.tensor([[token in subset for token in range(length)] for subset in subsets])
    with patch(model) as patched:
        output, states = patched.run(inputs, capture=[site])
        repeated = {name: value.repeat(len(subsets), 1) for name, value in inputs.items()}
        replaced = torch.where(kept[..., None], states[site], baseline)
        masked = patched.run(repeated, replace={site: replaced}).output
    nats = torch.zeros(len(subsets))
    for p, q in zip(logits_of(output), logits_of(masked), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        nats += F.kl_div(q, p.expand_as(q), reduction="none", log_target=True).sum(-1).float()
    same = [answer_of(masked, row, passage) == answer_of(output, 0, passage) for row in range(len(subsets))]
    return dict(zip(subsets, zip(nats.tolist(), same, strict=True), strict=True))


def logits_of(output: Any) -> list[Tensor]:
    return [output.logits] if "logits" in output else [output.start_logits, output.end_logits]


def answer_of(output: Any, row: int, passage: list[int]) -> Any:
    """The class, or the span of the passage whose start and end logits have the largest sum."""
    if "logits" in output:
        return output.logits[row].argmax().item()
    starts, ends = output.start_logits[row].tolist(), output.end_logits[row].tolist()
    return max(((s, e) for s in passage for e in passage if s <= e), key=lambda span: starts[span[0]] + ends[span[1]])


def keeping(truth: Truth, tolerance: float | None) -> dict[Subset, float]:
    return {s: nats for s, (nats, same) in truth.items() if same and (tolerance is None or nats <= tolerance)}


@pytest.fixture(scope="module")
def truths(five_classes: Any, tokenizer: Any, moments: Any) -> dict[str, list[Truth]]:
    """Of each site, of each text."""
    texts = [dict(tokenizer([text], return_tensors="pt")) for text in TEXTS]
    return {
        name: [brute_force(five_classes, text, site, moments[site].mean, []) for text in texts]
        for name, site in SITES.items()
    }


@pytest.fixture(scope="module")
def search(five_classes: Any, tokenizer: Any, moments: Any) -> Any:
    def run(texts: list[str] = TEXTS, **options: Any) -> Any:
        return attribute(five_classes, texts, tokenizer, method="erasure", **{"moments": moments, **options})

    return run


def kept(one: Attribution) -> Subset:
    assert set(one.keep.flatten().tolist()) <= {0.0, 1.0}
    return tuple(one.keep[:, 0].nonzero().squeeze(1).tolist())


def check_is_smallest(one: Attribution, candidates: dict[Subset, float]) -> None:
    size = min(map(len, candidates))
    assert len(kept(one)) == size == one.details["size"]
    assert candidates[kept(one)] <= min(nats for s, nats in candidates.items() if len(s) == size) + CLOSE
    assert one.details["proven"] == 1


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("site", SITES)
def test_what_is_found_is_what_trying_all_subsets_finds(
    site: str, tolerance: float | None, search: Any, truths: Any
) -> None:
    result = search(sites=[site], tolerance=tolerance)
    for one, truth in zip(result, truths[site], strict=True):
        check_is_smallest(one, keeping(truth, tolerance))
        assert one.kept_prediction.all() and one.divergence <= (tolerance or float("inf")) + CLOSE
        length, size = len(one.tokens), len(kept(one))
        tried = sum(comb(length, k) for k in range(size + 1))
        assert one.details["forwards"] == min(tried, 2**length - 1)  # the whole text needs no run
    sizes = result.details["size"]
    assert sizes.max() >= 2 and len(sizes.unique()) >= 2  # there was something to be found


def test_a_span_is_kept_within_the_passage(reader: Any, tokenizer: Any) -> None:
    examples = encode(tokenizer, PAIRS, reader)
    moments = state_moments(reader, examples)
    result = attribute(reader, PAIRS, tokenizer, method="erasure", sites=list(SITES.values()), moments=moments)
    for number, one in enumerate(result):
        inputs = dict(tokenizer([PAIRS[number][0]], [PAIRS[number][1]], return_tensors="pt"))
        passage = (one.segments == 2).nonzero().squeeze(1).tolist()
        for column, site in enumerate(SITES.values()):
            candidates = keeping(brute_force(reader, inputs, site, moments[site].mean, passage), None)
            found = tuple(one.keep[:, column].nonzero().squeeze(1).tolist())
            smallest = {s: nats for s, nats in candidates.items() if len(s) == min(map(len, candidates))}
            assert smallest[found] <= min(smallest.values()) + CLOSE
    assert result.details["size"].max() >= 1


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("site", SITES)
def test_a_beam_keeps_the_prediction_with_no_token_that_it_can_do_without(
    site: str, beam: int, search: Any, truths: Any
) -> None:
    result = search(sites=[site], tolerance=0.01, exhaustive_to=0, beam=beam)
    exact = search(sites=[site], tolerance=0.01)
    for one, best, truth in zip(result, exact, truths[site], strict=True):
        candidates, found = keeping(truth, 0.01), kept(one)
        assert found in candidates and len(found) >= best.details["size"]
        assert not any(smaller in candidates for smaller in combinations(found, max(0, len(found) - 1)) if found)
        # all subsets of up to one token are tried in any case
        assert one.details["proven"] == (len(found) <= 1)
    assert (result.details["proven"] == 0).any()
    assert result.details["forwards"].sum() < exact.details["forwards"].sum()


def test_only_a_text_with_too_many_tokens_is_left_to_a_beam(search: Any, truths: Any) -> None:
    result = search(sites=["layer 1"], tolerance=0.01, exhaustive_to=7)
    assert [one.details["proven"] == 1 for one in result] == [
        len(one.tokens) <= 7 or one.details["size"] <= 1 for one in result
    ]
    assert {(one.details["proven"] == 1).item() for one in result} == {True, False}


@pytest.mark.parametrize("exhaustive_to", [12, 0])
def test_no_subset_is_run_twice_and_no_call_has_more_rows_than_the_budget_or_needless_padding(
    exhaustive_to: int, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: Counter = Counter()
    mixed = Batch.mixed

    def watched(self: Batch, site: int, gates: Tensor, baseline: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:  # with no rows it is the masked prediction of the result
            assert len(rows) <= 10
            assert gates.shape[1] == self.real[rows].sum(-1).max()
            ran.update(
                (text, tuple(row.nonzero().flatten().tolist())) for text, row in zip(rows.tolist(), gates, strict=True)
            )
        return mixed(self, site, gates, baseline, rows)

    monkeypatch.setattr(Batch, "mixed", watched)
    result = search(TEXTS[:6], sites=["layer 1"], tolerance=0.01, exhaustive_to=exhaustive_to, budget=10)
    assert set(ran.values()) == {1}
    assert Counter(text for text, _ in ran) == dict(enumerate(result.details["forwards"].flatten().int().tolist()))


@pytest.mark.parametrize("exhaustive_to", [12, 0])
def test_neither_the_batch_nor_the_budget_changes_what_is_found(exhaustive_to: int, search: Any) -> None:
    options = {"sites": ["embedding"], "tolerance": 0.01, "exhaustive_to": exhaustive_to}
    one_way = search(TEXTS[:6], **options, batch_size=16, budget=1000)
    other_way = search(TEXTS[:6], **options, batch_size=2, budget=3)
    assert torch.equal(one_way.keep, other_way.keep)
    for name, values in one_way.details.items():
        assert torch.equal(values, other_way.details[name])


def test_special_tokens_can_be_kept_always(search: Any, truths: Any) -> None:
    result = search(sites=["layer 1"], tolerance=0.01, always="special")
    for one, truth in zip(result, truths["layer 1"], strict=True):
        last = len(one.tokens) - 1
        check_is_smallest(one, {s: nats for s, nats in keeping(truth, 0.01).items() if {0, last} <= set(s)})
    # there are 10 of 12 tokens to choose from
    longest = search(TEXTS[-1:], sites=["layer 1"], tolerance=0.01, always="special", exhaustive_to=10)
    assert longest.details["size"] >= 4 and longest.details["proven"] == 1


def test_a_token_whose_state_is_the_baseline_already_is_never_tried(
    five_classes: Any, tokenizer: Any, moments: Any, search: Any
) -> None:
    text = "the red fish played"
    the = five_classes.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("the")].detach()
    options = {"sites": [0], "moments": {0: Moments(the, moments[0].std)}, "tolerance": 0.0}
    one = search([text], **options)[0]
    assert [token for token, keep in zip(one.tokens, one.keep[:, 0].tolist(), strict=True) if not keep] == ["the"]
    assert one.details["forwards"] == 2 ** (len(one.tokens) - 1) - 1 and one.kept_prediction.all()


def test_the_whole_text_keeps_the_prediction_when_nothing_else_does(search: Any) -> None:
    for exhaustive_to in (12, 0):
        for one in search(TEXTS[:4], sites=["embedding"], tolerance=0.0, exhaustive_to=exhaustive_to):
            assert one.keep.eq(1).all() and one.details["size"] == len(one.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exhaustive_to": -1}, "exhaustive_to is -1; expected a whole number, 0 or more"),
        ({"beam": 0}, "beam is 0; expected a whole number, 1 or more"),
        ({"budget": 0}, "budget is 0; expected a whole number, 1 or more"),
        ({"budget": 2.5}, "budget is 2.5; expected a whole number"),
        ({"tolerance": -0.1}, "tolerance is -0.1; expected nats, 0 or more"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"always": "[CLS]"}, "always is '\\[CLS\\]'; expected \"special\""),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: dict, message: str, search: Any) -> None:
    with pytest.raises(ValueError, match=message):
        search(TEXTS[:1], sites=["embedding"], **options)
