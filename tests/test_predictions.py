from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from diffmask_fast.predictions import LONGEST_SPAN, answers, log_probabilities, prediction_kind, scored_answers
from diffmask_fast.predictions import kl_divergence as ours

EPS = torch.finfo(torch.float32).eps


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def span(start: torch.Tensor, end: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(start_logits=start, end_logits=end)


def test_divergence_of_classes_is_that_of_torch_distributions() -> None:
    p, q = draw(6, 5), draw(6, 5, seed=1)
    got = ours(log_probabilities(p, "classification"), log_probabilities(q, "classification"))
    expected = kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double()))
    # 5 terms, each a difference of logs up to ~20 with a rounding of a few eps
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=5 * 20 * 4 * EPS)


def test_divergence_of_a_binary_logit_is_that_of_bernoullis() -> None:
    p, q = draw(20), draw(20, seed=1)
    got = ours(log_probabilities(p, "binary"), log_probabilities(q, "binary"))
    expected = kl_divergence(Bernoulli(logits=p.double()), Bernoulli(logits=q.double()))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * 20 * 4 * EPS)


def test_a_binary_logit_may_come_as_a_column() -> None:
    logits = draw(7)
    assert torch.equal(log_probabilities(logits[:, None], "binary")[0], log_probabilities(logits, "binary")[0])


def test_divergence_of_a_span_is_start_plus_end() -> None:
    p, q = span(draw(4, 6), draw(4, 6, seed=1)), span(draw(4, 6, seed=2), draw(4, 6, seed=3))
    got = ours(log_probabilities(p, "span"), log_probabilities(q, "span"))
    expected = sum(
        kl_divergence(Categorical(logits=getattr(p, side).double()), Categorical(logits=getattr(q, side).double()))
        for side in ("start_logits", "end_logits")
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2 * 6 * 20 * 4 * EPS)


def test_divergence_of_a_span_does_not_see_the_padding() -> None:
    p, q = span(draw(1, 5), draw(1, 5, seed=1)), span(draw(1, 5, seed=2), draw(1, 5, seed=3))
    alone = ours(log_probabilities(p, "span"), log_probabilities(q, "span"))

    def padded(output: SimpleNamespace, what: float) -> tuple[torch.Tensor, ...]:
        pad = torch.full((1, 4), what)
        mask = torch.tensor([[1] * 5 + [0] * 4])
        longer = span(torch.cat([output.start_logits, pad], 1), torch.cat([output.end_logits, pad], 1))
        return log_probabilities(longer, "span", mask)

    for what in (0.0, 50.0, -50.0):
        torch.testing.assert_close(ours(padded(p, what), padded(q, -what)), alone, rtol=8 * EPS, atol=8 * EPS)


def test_a_prediction_does_not_diverge_from_itself() -> None:
    tables = log_probabilities(span(draw(3, 6), draw(3, 6, seed=1)), "span", torch.tensor([[1] * 4 + [0] * 2] * 3))
    assert torch.equal(ours(tables, tables), torch.zeros(3))


def test_probabilities_sum_to_one_over_the_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for table in log_probabilities(span(draw(2, 5), draw(2, 5, seed=1)), "span", mask):
        assert (table.exp()[mask == 0] == 0).all()
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(2), rtol=0, atol=8 * EPS)


def test_float64_logits_stay_float64_and_half_ones_become_float32() -> None:
    for kind, output in (("classification", draw(2, 3)), ("binary", draw(2)), ("span", None)):
        for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            value = span(draw(2, 3).to(given), draw(2, 3).to(given)) if output is None else output.to(given)
            assert {table.dtype for table in log_probabilities(value, kind)} == {expected}


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("some_allowed", [False, True])
def test_the_best_span_is_that_of_brute_force(length: int, some_allowed: bool) -> None:
    start, end = draw(5, length), draw(5, length, seed=1)
    allowed = torch.rand(5, length, generator=torch.Generator().manual_seed(2)) < 0.5 if some_allowed else None
    if allowed is not None:
        allowed[0] = False  # a row that allows nothing allows everything
    got = answers(log_probabilities(span(start, end), "span"), allowed)
    for row in range(5):
        fine = range(length)
        if allowed is not None and allowed[row].any():
            fine = [t for t in fine if allowed[row, t]]
        spans = [(s, e) for s in fine for e in fine if 0 <= e - s < LONGEST_SPAN]
        assert tuple(got[row].tolist()) == max(spans, key=lambda pair: (start[row, pair[0]] + end[row, pair[1]]).item())


def test_the_best_span_lies_on_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    high = torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0, 9.0]])
    assert answers(log_probabilities(span(high, high), "span", mask)).tolist() == [[2, 2]]


def test_the_answer_of_a_classification_is_the_likeliest_class() -> None:
    assert answers(log_probabilities(torch.tensor([[0.0, 3.0, 1.0]]), "classification")).tolist() == [[1]]
    assert answers(log_probabilities(torch.tensor([-1.0, 1.0]), "binary")).tolist() == [[0], [1]]


def test_the_score_of_a_span_is_its_start_logit_plus_its_end_logit() -> None:
    start, end = draw(4, 9) + torch.tensor([[0.0], [5.0], [-5.0], [100.0]]), draw(4, 9, seed=1)
    allowed = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    tables = log_probabilities(span(start, end), "span")
    found, scores = scored_answers(span(start, end), "span", tables, allowed)
    assert torch.equal(found, answers(tables, allowed))
    for row, (first, last) in enumerate(found.tolist()):
        assert scores[row].tolist() == [(start[row, first] + end[row, last]).item()]


def test_the_scores_of_classes_are_their_log_probabilities() -> None:
    for logits, kind in ((draw(3, 4), "classification"), (draw(3), "binary")):
        tables = log_probabilities(logits, kind)
        found, scores = scored_answers(logits, kind, tables)
        assert torch.equal(found, answers(tables)) and torch.equal(scores, tables[0])


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (torch.zeros(3), "binary"),
        (torch.zeros(3, 1), "binary"),
        (torch.zeros(3, 2), "classification"),
        (SimpleNamespace(logits=torch.zeros(3, 5)), "classification"),
        (SimpleNamespace(logits=torch.zeros(3, 1)), "binary"),
        (span(torch.zeros(3, 5), torch.zeros(3, 5)), "span"),
    ],
)
def test_the_kind_is_read_off_the_output(output: object, kind: str) -> None:
    assert prediction_kind(output) == kind


@pytest.mark.parametrize(
    "output",
    [torch.zeros(2, 3, 4), SimpleNamespace(logits=torch.zeros(2, 3, 4)), (torch.zeros(2),), None, "logits"],
)
def test_an_output_that_is_no_prediction_is_refused(output: object) -> None:
    with pytest.raises(TypeError, match=rf"the model's output \({type(output).__name__}\) is no prediction"):
        prediction_kind(output)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'ranking'; expected one of classification, span, binary"):
        log_probabilities(torch.zeros(2, 2), "ranking")
