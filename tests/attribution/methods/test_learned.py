from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
import torch
from reader import Reader, read_examples
from torch import Tensor, nn
from torch.nn.functional import softplus

from diffmask_fast.attribution.attribute import attribute
from diffmask_fast.attribution.methods import guan, schulz
from diffmask_fast.data import Examples, encode
from diffmask_fast.moments import Moments, state_moments
from diffmask_fast.sites import patch

TEXTS = ["a fine film", "the king was in the old river house", "dull"]
PAIRS = [("who was king", "the king was in the old house"), ("what", "a dull film")]
LEARNED = {"schulz": schulz, "guan": guan}
RATE, SEED, SITE = 0.1, 7, 1


def noise(ids: list[int], width: int, steps: int) -> list[Tensor]:
    """The noise of a text, a (1, T, H) for each step."""
    stream = torch.Generator().manual_seed(crc32(torch.tensor(ids).numpy().tobytes(), SEED))
    return [torch.randn(1, len(ids), width, generator=stream) for _ in range(steps)]


class Plain:
    """Loss and score of one unpadded text as the formulas have them."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], home: Moments):
        self.model, self.inputs, self.home = model, inputs, home
        with torch.no_grad(), patch(model) as patched:
            output, states = patched.run(inputs, capture=(SITE,))
        self.state, self.logits = states[SITE], self.logits_of(output)

    def logits_of(self, output: Any) -> list[Tensor]:
        return [output.start_logits, output.end_logits] if "start_logits" in output else [output.logits]

    def with_state(self, state: Tensor) -> list[Tensor]:
        with patch(self.model) as patched:
            return self.logits_of(patched.run(self.inputs, replace={SITE: state}).output)


class PlainSchulz(Plain):
    start = 5.0

    @property
    def shape(self) -> torch.Size:
        return self.state.shape

    def information(self, alpha: Tensor) -> Tensor:
        share = torch.sigmoid(alpha)
        mean, std = self.home.mean.double(), self.home.std.double()
        around = torch.distributions.Normal(share * self.state + (1 - share) * mean, (1 - share) * std)
        return torch.distributions.kl_divergence(
            around, torch.distributions.Normal(mean, std).expand(around.mean.shape)
        )

    def loss(self, alpha: Tensor, draw: Tensor) -> Tensor:
        share = torch.sigmoid(alpha)
        random = self.home.mean + self.home.std * draw.double()
        logits = self.with_state(share * self.state + (1 - share) * random)
        categorical = torch.distributions.Categorical
        lost = sum(
            torch.distributions.kl_divergence(categorical(logits=a), categorical(logits=b))
            for a, b in zip(self.logits, logits, strict=True)
        )
        return lost + 3.0 * self.information(alpha).mean()

    def score(self, alpha: Tensor) -> Tensor:
        return self.information(alpha).sum(-1)


class PlainGuan(Plain):
    start = -5.0

    @property
    def shape(self) -> torch.Size:
        return self.state.shape[:2]

    def sigma(self, rho: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(rho))

    def loss(self, rho: Tensor, draw: Tensor) -> Tensor:
        sigma = self.sigma(rho)
        unit = self.home.std.double().square().mean().sqrt()
        logits = self.with_state(self.state + (sigma * unit)[..., None] * draw.double())
        moved = sum(((a - b) ** 2).sum() for a, b in zip(self.logits, logits, strict=True))
        return moved - 0.3 * sigma.log().sum()

    def score(self, rho: Tensor) -> Tensor:
        return 1 / self.sigma(rho)


OPTIONS: dict[str, dict] = {"schulz": {"beta": 3.0}, "guan": {"weight": 0.3}}
PLAIN: dict[str, type] = {"schulz": PlainSchulz, "guan": PlainGuan}


def by_adam(start: Tensor, gradients: Callable[[Tensor, int], Tensor], steps: int, rate: float = RATE) -> Tensor:
    """Kingma and Ba 2015, algorithm 1, with the usual constants."""
    value, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(steps):
        gradient = gradients(value, step)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        value = value - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
    return value


@pytest.fixture(params=["ForSequenceClassification", "ForQuestionAnswering"])
def model(request: pytest.FixtureRequest, tiny_bert: Any) -> Any:
    return tiny_bert(request.param).double().requires_grad_(False)


@pytest.fixture
def examples(model: Any, tokenizer: Any) -> Examples:
    return encode(tokenizer, TEXTS if "Sequence" in type(model).__name__ else PAIRS, model)


def plain_texts(name: str, model: Any, examples: Examples, home: Moments) -> list[Any]:
    return [PLAIN[name](model, examples.collate([item]), home) for item in examples.inputs]


@pytest.mark.parametrize("name", LEARNED)
def test_loss_and_gradient_of_each_text_are_those_of_the_formulas(
    name: str, model: Any, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = state_moments(model, examples, [SITE])
    seen = []

    def spy(batch: Any, start: Tensor, loss: Callable, noise_like: Tensor, *_: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        at = torch.randn(start.shape, generator=generator, dtype=start.dtype).requires_grad_()
        draw = torch.randn(noise_like.shape, generator=generator)
        with torch.enable_grad():
            losses = loss(at, draw)
            losses.sum().backward()
        seen.extend(zip(at.detach(), draw, losses.detach(), at.grad, batch.real.sum(1).tolist(), strict=True))
        return at.detach()

    monkeypatch.setattr(LEARNED[name], "learned", spy)
    attribute(model, examples, method=name, sites=[SITE], moments=homes, **OPTIONS[name])
    order = [i for batch in examples.batches(16) for i in batch]
    plain = plain_texts(name, model, examples, homes[SITE])
    assert len(order) == len(seen)
    for i, (at, draw, loss, gradient, length) in zip(order, seen, strict=True):
        alone = at[None, :length].clone().requires_grad_()
        expected = plain[i].loss(alone, draw[None, :length])
        expected.sum().backward()
        # float64: some forty operations with sums of at most 32 terms, on values up to some hundreds
        torch.testing.assert_close(loss, expected.detach().squeeze(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient[:length], alone.grad[0], rtol=1e-10, atol=1e-10)
        assert not gradient[length:].any()  # padding is no part of any loss


@pytest.mark.parametrize("name", LEARNED)
def test_steps_of_a_batch_are_those_of_each_text_alone(name: str, model: Any, examples: Examples) -> None:
    steps = 6
    homes = state_moments(model, examples, [SITE])
    options = {"steps": steps, "rate": RATE, "seed": SEED, **OPTIONS[name]}
    found = attribute(model, examples, method=name, sites=[SITE], moments=homes, **options)
    for i, plain in enumerate(plain_texts(name, model, examples, homes[SITE])):
        draws = noise(examples.inputs[i]["input_ids"], plain.state.shape[-1], steps)

        def gradient(at: Tensor, step: int, plain: Any = plain, draws: list[Tensor] = draws) -> Tensor:
            at = at.clone().requires_grad_()
            (found,) = torch.autograd.grad(plain.loss(at, draws[step]).sum(), at)
            return found

        expected = plain.score(by_adam(torch.full(plain.shape, plain.start).double(), gradient, steps))[0]
        # Adam divides by at least 1e-8, so that gradients 1e-14 apart move 6 steps of 0.1 by at most 6e-7, and scores
        # change at most some ten times as fast; they are then rounded to float32
        torch.testing.assert_close(found[i].scores[:, 0].double(), expected, rtol=1e-6, atol=1e-5)


def test_the_bottleneck_lets_information_through_at_the_token_that_is_read_and_less_and_less_at_others() -> None:
    texts = read_examples()
    few, many = (attribute(Reader(), texts, method="schulz", beta=0.1, steps=steps) for steps in (150, 400))
    for fewer, more in zip(few, many, strict=True):
        assert fewer.scores is not None and more.scores is not None
        read = torch.arange(len(more.scores)) == 1
        # what is read tells three classes apart; nothing but steps keeps the rest from zero
        assert more.scores[read].item() > math.log(3)
        assert (more.scores[~read] < 0.3 * fewer.scores[~read]).all()
        assert (more.scores[~read] >= 0).all() and (more.keep[~read] < 0.01).all()


def test_noise_grows_to_the_size_worked_out_by_hand_at_the_token_that_is_read() -> None:
    model, texts, weight = Reader(), read_examples(), 0.1
    homes = state_moments(model, texts)
    result = attribute(model, texts, method="guan", moments=homes, weight=weight, rate=0.02, steps=1000)
    unread = by_adam(torch.tensor(-5.0).double(), lambda rho, _: -weight * rho.sigmoid() / softplus(rho), 1000, 0.02)
    # E |W sigma unit noise|^2 = sigma^2 unit^2 |W|^2, and its least value with - weight log sigma
    unit = homes[0].std.square().mean().sqrt()
    sigma = math.sqrt(weight / 2) / (unit * model.output.weight.norm())
    for one in result:
        assert one.scores is not None
        scores = one.scores[:, 0]
        # Around the minimum the slope of log sigma has curvature 2 weight and a deviation of at most sqrt(2) weight
        # (one draw of a chi-square), so Adam's steps of 0.02 leave a variance of 0.02 * sqrt(2) / 4: five deviations
        assert abs((scores[1] * sigma).log()) < 5 * math.sqrt(0.02 * math.sqrt(2) / 4)
        # nothing but the entropy moves the others; a thousand roundings of float32 on the way to about 6.5
        others = scores[torch.arange(len(scores)) != 1]
        torch.testing.assert_close(others, torch.full_like(others, 1 / softplus(unread)), rtol=1e-3, atol=0)


def test_noise_is_standard_normal_and_goes_with_the_tokens_and_the_seed() -> None:
    from diffmask_fast.attribution.batch import read_batch
    from diffmask_fast.attribution.methods.learned import noise_of

    model, texts = Reader(), read_examples(200)
    with torch.no_grad(), patch(model) as patched:
        batch = read_batch(patched, texts, list(range(200)), [0], torch.device("cpu"))
        again = read_batch(patched, texts, [7, 3], [0], torch.device("cpu"))
    draws = [noise_of(each, each.states[0], seed)() for each, seed in ((batch, 0), (again, 0), (batch, 1))]
    length = len(texts.tokens[7])
    assert torch.equal(draws[0][7, :length], draws[1][0, :length])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0][batch.real == 0].any()
    values = draws[0][batch.real == 1].double()
    distinct = values.unique().double()  # texts with the same tokens have the same noise
    count = distinct.numel()
    assert count > 1000
    assert abs(distinct.mean()) < 5 / math.sqrt(count)
    assert abs(distinct.square().mean() - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("name", LEARNED)
def test_the_same_text_twice_gets_the_same_and_another_seed_something_else(name: str) -> None:
    texts = read_examples(3).select([0, 1, 0, 2])
    one, other = (attribute(Reader(), texts, method=name, steps=5, seed=seed) for seed in (0, 1))
    assert one.scores is not None and torch.equal(one[0].scores, one[2].scores)
    assert not torch.equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("schulz", {"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ("guan", {"steps": 2.5}, "steps is 2.5"),
        ("guan", {"rate": 0.0}, "rate is 0.0; expected a number above 0"),
        ("schulz", {"beta": float("nan")}, "beta is nan; expected a number above 0"),
        ("guan", {"weight": -1}, "weight is -1"),
        ("schulz", {"seed": "x"}, "seed is 'x'; expected a whole number"),
    ],
)
def test_an_option_out_of_range_is_one_clear_error(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(Reader(), read_examples(), method=name, **options)


def test_information_is_that_of_two_normals_also_where_nearly_all_is_let_through() -> None:
    alpha = torch.linspace(-8, 8, 33).double()
    x, mean, std = torch.tensor([1.7, 0.4, 0.6]).double()
    share = alpha.sigmoid()
    noisy = torch.distributions.Normal(share * x + (1 - share) * mean, (1 - share) * std)
    expected = torch.distributions.kl_divergence(noisy, torch.distributions.Normal(mean, std))
    torch.testing.assert_close(schulz.information(alpha, ((x - mean) / std) ** 2), expected, rtol=1e-9, atol=1e-12)
    assert schulz.information(torch.tensor(100.0), torch.tensor(4.0)).isfinite()


def test_numbers_that_never_vary_hold_a_bounded_amount_of_information() -> None:
    home = Moments(torch.zeros(4), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(schulz.spread(home), torch.tensor([0.01 * math.sqrt(0.75), 1.0, 1.0, 1.0]))
    assert (schulz.spread(Moments(torch.zeros(2), torch.zeros(2))) > 0).all()
