from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from diffmask_fast.predictions import (
    LONGEST_SPAN,
    AtPositions,
    Binary,
    Classes,
    Kind,
    Labels,
    Own,
    Span,
    Values,
    kind_for,
    kind_of,
    require_kind,
)

EPS = torch.finfo(torch.float32).eps
REAL = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def span(start: torch.Tensor, end: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(start_logits=start, end_logits=end)


def inputs_of(real: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"attention_mask": real, "input_ids": torch.arange(real.numel()).view(real.shape) % 4}


def divergence(kind: Kind, p: Any, q: Any, real: torch.Tensor | None = None) -> torch.Tensor:
    logits = p.start_logits if isinstance(kind, Span) else p
    inputs = inputs_of(torch.ones(logits.shape[:2], dtype=torch.int64) if real is None else real)
    return kind.divergence(kind.tables(p, inputs), kind.tables(q, inputs))


# Of the tolerances below: each of the n terms of a sum is a difference of logs up to ~20 with a rounding of a few eps.


def test_divergence_of_classes_is_that_of_torch_distributions() -> None:
    p, q = draw(6, 5), draw(6, 5, seed=1)
    expected = kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double()))
    torch.testing.assert_close(divergence(Classes(), p, q).double(), expected, rtol=0, atol=5 * 20 * 4 * EPS)


def test_divergence_of_a_binary_logit_is_that_of_bernoullis() -> None:
    p, q = draw(20, 1), draw(20, 1, seed=1)
    expected = kl_divergence(Bernoulli(logits=p[:, 0].double()), Bernoulli(logits=q[:, 0].double()))
    torch.testing.assert_close(divergence(Binary(), p, q).double(), expected, rtol=0, atol=2 * 20 * 4 * EPS)


def test_a_binary_logit_may_come_as_a_column() -> None:
    logits = draw(7)
    assert torch.equal(Binary().tables(logits[:, None], {})[0], Binary().tables(logits, {})[0])


def test_divergence_of_labels_is_the_sum_of_those_of_bernoullis() -> None:
    p, q = draw(8, 5), draw(8, 5, seed=1)
    expected = kl_divergence(Bernoulli(logits=p.double()), Bernoulli(logits=q.double())).sum(-1)
    torch.testing.assert_close(divergence(Labels(), p, q).double(), expected, rtol=0, atol=10 * 20 * 4 * EPS)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_divergence_of_values_is_that_of_normal_distributions(scale: float) -> None:
    p, q = draw(8, 3), draw(8, 3, seed=1)
    expected = kl_divergence(Normal(p.double(), scale), Normal(q.double(), scale)).sum(-1)
    torch.testing.assert_close(divergence(Values(scale), p, q).double(), expected, rtol=16 * EPS, atol=0)


def test_divergence_of_a_span_is_start_plus_end() -> None:
    p, q = span(draw(4, 6), draw(4, 6, seed=1)), span(draw(4, 6, seed=2), draw(4, 6, seed=3))
    expected = sum(
        kl_divergence(Categorical(logits=getattr(p, side).double()), Categorical(logits=getattr(q, side).double()))
        for side in ("start_logits", "end_logits")
    )
    torch.testing.assert_close(divergence(Span(), p, q).double(), expected, rtol=0, atol=2 * 6 * 20 * 4 * EPS)


PLACES = {
    "every": [[0, 1, 2, 3, 4, 5], [0, 1, 2], [0, 1, 2, 3, 4]],
    "last": [[5], [2], [4]],
    2: [[2], [0], [2]],  # where the input is a 2
    "function": [[0, 1], [0, 1], [0, 1]],
}


@pytest.mark.parametrize("where", PLACES)
def test_divergence_at_places_is_the_mean_over_them(where: str | int) -> None:
    first_two = AtPositions(lambda inputs: torch.arange(6).expand(3, 6) < 2)
    kind = first_two if where == "function" else AtPositions(where)
    p, q = draw(3, 6, 4), draw(3, 6, 4, seed=1)
    got = divergence(kind, p, q, REAL)
    every = kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double()))
    expected = torch.stack([row[places].mean() for row, places in zip(every, PLACES[where], strict=True)])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=4 * 20 * 4 * EPS)
    answers = kind.answers(kind.tables(p, inputs_of(REAL)))
    for row, found, places in zip(p, answers.tolist(), PLACES[where], strict=True):
        assert found == row.argmax(-1)[places].tolist() + [-1] * (len(found) - len(places))


def test_a_text_without_a_place_diverges_by_nothing() -> None:
    kind, inputs = AtPositions(3), inputs_of(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    p, q = (kind.tables(draw(2, 4, 3, seed=seed), inputs) for seed in (0, 1))
    got = kind.divergence(p, q)
    assert got[0] > 0 and got[1] == 0
    assert kind.log_probability(p, kind.answers(p))[1] == 0


@pytest.mark.parametrize("kind", [Span(), AtPositions("every"), AtPositions("last")])
def test_divergence_does_not_see_the_padding(kind: Kind) -> None:
    shape = (1, 5) if isinstance(kind, Span) else (1, 5, 3)
    logits = [draw(*shape, seed=seed) for seed in range(4)]

    def tables(first: torch.Tensor, second: torch.Tensor, pad: float | None) -> Any:
        real = torch.ones(1, 5, dtype=torch.int64)
        if pad is not None:
            more = torch.full((1, 4, *shape[2:]), pad)
            first, second = torch.cat([first, more], 1), torch.cat([second, more], 1)
            real = torch.cat([real, torch.zeros(1, 4, dtype=torch.int64)], 1)
        return kind.tables(span(first, second) if isinstance(kind, Span) else first, inputs_of(real))

    alone = kind.divergence(tables(*logits[:2], None), tables(*logits[2:], None))
    for what in (0.0, 50.0, -50.0):
        padded = kind.divergence(tables(*logits[:2], what), tables(*logits[2:], -what))
        torch.testing.assert_close(padded, alone, rtol=8 * EPS, atol=8 * EPS)


EVERY = [
    (Classes(), draw(3, 4)),
    (Binary(), draw(3)),
    (Labels(), draw(3, 4)),
    (Values(0.5), draw(3, 2)),
    (Values(), draw(3)),
    (AtPositions("every"), draw(3, 6, 4)),
    (AtPositions("last"), draw(3, 6, 4)),
    (Own(lambda p, q: (p - q).square().sum(-1)), draw(3, 4)),
    (Span(), span(draw(3, 6), draw(3, 6, seed=1))),
]


@pytest.mark.parametrize(("kind", "output"), EVERY)
def test_a_prediction_does_not_diverge_from_itself_and_is_the_same(kind: Kind, output: Any) -> None:
    tables = kind.tables(output, inputs_of(REAL))
    assert torch.equal(kind.divergence(tables, tables), torch.zeros(3))
    answers = kind.answers(tables)
    assert answers.shape[0] == 3 and answers.dim() == 2
    assert kind.same(answers, answers).tolist() == [True] * 3
    assert isinstance(kind.words(answers[0].tolist(), str), str)


@pytest.mark.parametrize(("kind", "output"), EVERY)
def test_a_single_window_gives_the_answers_of_its_text(kind: Kind, output: Any) -> None:
    if isinstance(kind, Span | AtPositions | Own):
        pytest.skip("found in another way")
    tables = kind.tables(output, inputs_of(REAL))
    answers = kind.answers(tables)
    assert torch.equal(kind.of_windows(kind.scores(output, tables, answers)[None]), answers)


@pytest.mark.parametrize(("kind", "output"), EVERY)
def test_float64_stays_float64_and_half_becomes_float32(kind: Kind, output: Any) -> None:
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        value = output
        value = span(draw(3, 6).to(given), draw(3, 6).to(given)) if isinstance(kind, Span) else output.to(given)
        assert {table.dtype for table in kind.tables(value, inputs_of(REAL))} == {expected}


def test_probabilities_sum_to_one_over_the_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for table in Span().tables(span(draw(2, 5), draw(2, 5, seed=1)), inputs_of(mask)):
        assert (table.exp()[mask == 0] == 0).all()
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(2), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("some_allowed", [False, True])
def test_the_best_span_is_that_of_brute_force(length: int, some_allowed: bool) -> None:
    start, end = draw(5, length), draw(5, length, seed=1)
    allowed = torch.rand(5, length, generator=torch.Generator().manual_seed(2)) < 0.5 if some_allowed else None
    if allowed is not None:
        allowed[0] = False  # a row that allows nothing allows everything
    tables = Span().tables(span(start, end), inputs_of(torch.ones(5, length)))
    got = Span().answers(tables, allowed)
    for row in range(5):
        fine = range(length)
        if allowed is not None and allowed[row].any():
            fine = [t for t in fine if allowed[row, t]]
        spans = [(s, e) for s in fine for e in fine if 0 <= e - s < LONGEST_SPAN]
        assert tuple(got[row].tolist()) == max(spans, key=lambda pair: (start[row, pair[0]] + end[row, pair[1]]).item())


def test_the_best_span_lies_on_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    high = torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0, 9.0]])
    assert Span().answers(Span().tables(span(high, high), inputs_of(mask))).tolist() == [[2, 2]]


def test_answers() -> None:
    assert Classes().answers(Classes().tables(torch.tensor([[0.0, 3.0, 1.0]]), {})).tolist() == [[1]]
    assert Binary().answers(Binary().tables(torch.tensor([-1.0, 1.0]), {})).tolist() == [[0], [1]]
    labels = Labels().answers(Labels().tables(torch.tensor([[-1.0, 1.0, 2.0], [-1.0, -1.0, -1.0]]), {}))
    assert labels.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert [Labels().words(row, "abc".__getitem__) for row in labels.tolist()] == ["b, c", "(none)"]
    values = Values(0.5).answers(Values(0.5).tables(torch.tensor([[2.5, -1.0]]), {}))
    assert values.tolist() == [[2.5, -1.0]] and Values().words(values[0].tolist(), str) == "2.5, -1"
    moved = values + torch.tensor([[0.5, -0.5]])
    assert Values(0.5).same(values, moved).item() and not Values(0.4).same(values, moved).item()


def test_the_score_of_a_span_is_its_start_logit_plus_its_end_logit() -> None:
    start, end = draw(4, 9) + torch.tensor([[0.0], [5.0], [-5.0], [100.0]]), draw(4, 9, seed=1)
    allowed = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    tables = Span().tables(span(start, end), inputs_of(torch.ones(4, 9)))
    found = Span().answers(tables, allowed)
    scores = Span().scores(span(start, end), tables, found)
    for row, (first, last) in enumerate(found.tolist()):
        assert scores[row].tolist() == [(start[row, first] + end[row, last]).item()]


def test_log_probabilities_of_answers() -> None:
    inputs = inputs_of(REAL)
    labels = Labels().tables(draw(3, 4), inputs)
    answers = torch.tensor([[0, 1, 1, 0]] * 3)
    expected = Bernoulli(logits=draw(3, 4)).log_prob(answers.float()).sum(-1)
    torch.testing.assert_close(Labels().log_probability(labels, answers), expected, rtol=1e-5, atol=1e-6)
    kind = AtPositions("every")
    tables = kind.tables(draw(3, 6, 4), inputs)
    own = draw(3, 6, 4).log_softmax(-1).amax(-1)
    expected = torch.stack([row[:length].mean() for row, length in zip(own, (6, 3, 5), strict=True)])
    torch.testing.assert_close(kind.log_probability(tables, kind.answers(tables)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no probability, which integrated gradients"):
        Own(lambda p, q: p).log_probability((draw(3, 4),), answers)


def test_only_the_places_asked_about_become_probabilities() -> None:
    (table,) = AtPositions("last").tables(draw(3, 6, 4), inputs_of(REAL))
    assert table.shape == (3, 1, 4)


def test_a_kind_of_ones_own_reads_and_answers() -> None:
    kind = Own(
        lambda p, q: (p - q).abs().amax(-1),
        read=lambda output, inputs: output["scores"] * inputs["attention_mask"].sum(),
        answer=lambda read: read.argsort(-1),
    )
    inputs = {"attention_mask": torch.ones(2, 3)}
    (table,) = kind.tables({"scores": torch.tensor([[1.0, 3.0, 2.0]] * 2)}, inputs)
    assert table.tolist() == [[6.0, 18.0, 12.0]] * 2
    assert kind.answers((table,)).tolist() == [[0, 2, 1]] * 2
    assert kind.divergence((table,), (table + 1,)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"distance gave \(2, 3\); expected one number per example, \(2,\)"):
        Own(lambda p, q: p - q).divergence((table,), (table,))
    for read, got in ((1.0, "float"), (torch.tensor(1.0), r"\(\)"), (torch.zeros(3), r"\(3,\)")):
        with pytest.raises(TypeError, match=rf"a tensor \(2,\) or \(2, ...\) from `read`, got {got}"):
            Own(lambda p, q: p, read=lambda output, inputs, read=read: read).tables(None, inputs)


def test_a_single_number_of_ones_own_needs_an_answer() -> None:
    kind = Own(lambda p, q: (p - q).abs().sum(-1), read=lambda output, inputs: output[:, 0])
    tables = kind.tables(torch.tensor([[1.5], [2.0]]), {"attention_mask": torch.ones(2, 3)})
    assert tables[0].tolist() == [[1.5], [2.0]]
    with pytest.raises(ValueError, match=r"say by Own\(..., answer=...\) when the prediction stays"):
        kind.answers(tables)
    assert Own(kind.distance, kind.read, torch.round).words([2.0], str) == "2"
    assert Own(kind.distance, kind.read, torch.round).words([-0.0], str) == "0"
    with pytest.raises(TypeError, match=r"expected `logits` of shape \(B, C\), or Own\(..., read=...\)"):
        Own(kind.distance).tables(torch.zeros(2, 3, 4), {"attention_mask": torch.ones(2, 3)})


def test_a_word_that_is_ruled_out_is_no_error() -> None:
    logits = draw(1, 2, 5)
    logits[..., 3] = -torch.inf
    kind, inputs = AtPositions("last"), {"attention_mask": torch.ones(1, 2)}
    tables = kind.tables(logits, inputs)
    expected = logits[:, -1, [0, 1, 2, 4]].log_softmax(-1)
    torch.testing.assert_close(tables[0][:, 0, [0, 1, 2, 4]], expected, rtol=1e-6, atol=1e-6)
    assert kind.divergence(tables, tables).item() == 0


def test_only_places_that_are_there_are_asked() -> None:
    tables = AtPositions(3).tables(draw(2, 4, 3), inputs_of(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])))
    assert AtPositions(3).asked(tables).tolist() == [True, False]
    assert Classes().asked((draw(2, 3),)).tolist() == [True, True]


def test_the_id_of_a_token_may_be_a_number_of_numpy() -> None:
    import numpy as np

    assert AtPositions(np.int64(4)) == AtPositions(4)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (torch.zeros(3), Binary()),
        (torch.zeros(3, 1), Binary()),
        (torch.zeros(3, 2), Classes()),
        (SimpleNamespace(logits=torch.zeros(3, 5)), Classes()),
        (SimpleNamespace(logits=torch.zeros(3, 1)), Binary()),
        (span(torch.zeros(3, 5), torch.zeros(3, 5)), Span()),
    ],
)
def test_the_kind_is_read_off_the_output(output: object, kind: Kind) -> None:
    assert kind_of(output) == kind


@pytest.mark.parametrize(
    "output",
    [
        torch.zeros(2, 3, 4),
        torch.tensor(1.0),
        SimpleNamespace(logits=torch.zeros(2, 3, 4)),
        (torch.zeros(2),),
        None,
        "logits",
    ],
)
def test_an_output_that_is_no_prediction_is_refused(output: object) -> None:
    with pytest.raises(TypeError, match=rf"the model's output \({type(output).__name__}.*\) is no prediction"):
        kind_of(output)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (Classes(), torch.zeros(3)),
        (Labels(), torch.zeros(3, 6, 4)),
        (Binary(), torch.zeros(3, 2)),
        (Values(), torch.zeros(3, 6, 4)),
        (Span(), torch.zeros(3, 6)),
        (AtPositions("every"), torch.zeros(3, 6)),
        (AtPositions("every"), torch.zeros(3, 5, 4)),
    ],
)
def test_an_output_of_another_kind_is_refused(kind: Kind, output: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"is no prediction that can be compared: expected `"):
        kind.tables(output, inputs_of(REAL))


@pytest.mark.parametrize(
    ("head", "settings", "expected"),
    [
        ("ForSequenceClassification", {}, None),
        ("ForQuestionAnswering", {}, None),
        ("ForSequenceClassification", {"problem_type": "regression", "num_labels": 1}, Values()),
        ("ForSequenceClassification", {"problem_type": "multi_label_classification", "num_labels": 4}, Labels()),
        ("ForTokenClassification", {}, AtPositions("every")),
        ("ForMaskedLM", {}, AtPositions(4)),
        ("LMHeadModel", {"is_decoder": True}, AtPositions("last")),
    ],
)
def test_the_kind_is_that_which_the_model_was_made_for(
    head: str, settings: dict, expected: Kind | None, tiny_bert: Any, tokenizer: Any
) -> None:
    assert kind_for(tiny_bert(head, **settings), tokenizer) == expected


def transformers_model(name: str) -> Any:
    """One of that class without anything in it but an empty configuration."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name).__new__(getattr(transformers, name))
    object.__setattr__(model, "config", SimpleNamespace())
    return model


def test_a_model_that_leaves_its_kind_open_is_refused(tiny_bert: Any) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification has one output and no problem_type"):
        kind_for(tiny_bert(num_labels=1))
    both = transformers_model("XLMWithLMHeadModel")
    with pytest.raises(ValueError, match="may be a causal or a masked language model"):
        kind_for(both)
    with pytest.raises(ValueError, match="its tokenizer has no mask token"):
        kind_for(tiny_bert("ForMaskedLM"), SimpleNamespace(mask_token_id=None))
    with pytest.raises(ValueError, match=r"problem_type is 'regression'.*Values\(\) or Labels\(\)"):
        require_kind(tiny_bert(problem_type="regression"), None)
    with pytest.raises(TypeError, match=r"such as Classes\(\), got 'classes'"):
        require_kind(tiny_bert(), "classes")


def test_wrong_settings_of_a_kind_are_refused() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale is"):
            Values(scale)
    for where in ("first", True, 1.5, None):
        with pytest.raises(ValueError, match="where is"):
            AtPositions(where)
