from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
from torch import Tensor, nn

from diffmask_fast.masking import frozen
from diffmask_fast.ops import backends, draw_seed, gate_mix, uniforms
from diffmask_fast.ops.reference import TEMPERATURE, log_open
from diffmask_fast.predictions import Span, kind_of
from diffmask_fast.probes import Probe
from diffmask_fast.sites import patch
from diffmask_fast.training import objective as module
from diffmask_fast.training.objective import ALWAYS_OPEN, Objective, pulled, rank_seed
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.remembered import RememberedPredictions

SITES, WIDTH, CLASSES, TOLERANCE, SEED = 4, 16, 2, 0.3, 11
PUBLISHED = Recipe(
    tolerance=TOLERANCE, pull=0.0, draw="batch", credit="all", multiplier="ascent", initial_multiplier=2.0
)


def with_recipe(**changes: Any) -> Recipe:
    return Recipe(**{**PUBLISHED.to_dict(), **changes})


@pytest.fixture(scope="module", params=["ForSequenceClassification", "ForQuestionAnswering"])
def model(request: pytest.FixtureRequest, tiny_bert: Any) -> nn.Module:
    return tiny_bert(request.param, attn_implementation="eager").double()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])}


def a_probe(masking: str) -> Probe:
    torch.manual_seed(1)
    probe = Probe([WIDTH] * SITES, masking, bound=10.0, bias=0.5).double()
    for baseline in probe.baselines:
        nn.init.normal_(baseline)
    return probe


@pytest.fixture
def make(model: nn.Module) -> Iterator[Any]:
    """make(masking, recipe, sites): an objective that draws those sites, on the frozen model."""
    with ExitStack() as stack:

        def build(masking: str, recipe: Recipe, sites: list[int] | None = None) -> Objective:
            stack.enter_context(frozen(model))
            made = Objective(stack.enter_context(patch(model)), a_probe(masking), recipe).double()
            made.multipliers.value.data.copy_(torch.arange(1, SITES + 1))
            if sites is not None:
                made.draw_sites = lambda examples: torch.tensor(sites)
            return made

        yield build


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def plain_step(
    model: nn.Module, objective: Objective, inputs: dict[str, Tensor], site: int, u: Tensor, own: bool = False
) -> Tensor:
    """(B,) terms of the loss, all examples at one site, with uniforms u (B, T, gates): by none of our fast paths."""
    divergence, opens = published.step(model, objective.probe, inputs, site, u)
    if own:
        opens = torch.cat([opens[..., :-1].detach(), opens[..., -1:]], -1)
    multiplier = objective.multipliers.value[site]
    return published.lagrangian(divergence, opens, inputs["attention_mask"], multiplier, TOLERANCE)


def same(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """float64: sums of some hundred products of size 1, 1e-16 each, through slopes of at most some hundred."""
    assert ours.keys() == plain.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


EXAMPLES = torch.tensor([4, 0, 3])  # the numbers of the three in a data set of five


@pytest.fixture(params=["computed", "remembered"])
def call(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    """call(objective, inputs): a step that computes the original predictions, or one that remembers them."""

    def step(objective: Objective, inputs: dict) -> Tensor:
        if request.param == "computed":
            return objective(**inputs)["loss"]
        lengths = dict(zip(EXAMPLES.tolist(), inputs["attention_mask"].sum(-1).tolist(), strict=True))
        with torch.no_grad():
            kind = kind_of(objective.patched.run(inputs).output)
        sizes = [(lengths.get(i, 3),) * 2 if kind == Span() else (CLASSES,) for i in range(5)]
        objective.remembered = RememberedPredictions(tmp_path, "test", sizes, torch.float64)
        state = torch.get_rng_state()
        objective(**inputs, example=EXAMPLES)
        assert objective.remembered.get(EXAMPLES.tolist()) is not None
        torch.set_rng_state(state)
        whole = []
        watch = objective.patched.run
        objective.patched.run = lambda *a, **k: whole.append(k.get("stop")) or watch(*a, **k)
        loss = objective(**inputs, example=EXAMPLES)["loss"]
        assert len(whole) == 1 or whole[0] is not None  # no second whole pass
        return loss

    return step


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("site", range(SITES))
def test_a_step_is_the_plain_two_pass_step(
    masking: str, site: int, make: Any, call: Any, model: nn.Module, inputs: dict
) -> None:
    objective = make(masking, PUBLISHED, [site] * 3)
    torch.manual_seed(SEED)
    loss = call(objective, inputs)
    torch.manual_seed(SEED)
    gates = site + 1 if masking == "input" else 1
    u = uniforms(draw_seed(), 3 * 6 * gates).view(3, 6, gates).double()
    plain = plain_step(model, objective, inputs, site, u).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    same(gradients(objective, loss), gradients(objective, plain))


@pytest.mark.parametrize("credit", ["all", "own"])
@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("sites", [[3, 0, 2], [1, 3, 1], [0, 0, 0]])
def test_sites_by_example_are_the_mean_of_each_examples_plain_step(
    sites: list[int], masking: str, credit: str, make: Any, call: Any, model: nn.Module, inputs: dict
) -> None:
    objective = make(masking, with_recipe(draw="example", credit=credit), sites)
    torch.manual_seed(SEED)
    loss = call(objective, inputs)
    torch.manual_seed(SEED)
    by_example: dict[int, Tensor] = {}
    if masking == "input":  # one draw; an example uses the gates up to its site
        u = uniforms(draw_seed(), 3 * 6 * (max(sites) + 1)).view(3, 6, -1)
        by_example = {b: u[b : b + 1, :, : site + 1] for b, site in enumerate(sites)}
    else:  # one draw for each site, for its examples in their order
        for site in sorted(set(sites)):
            rows = [b for b, s in enumerate(sites) if s == site]
            by_example |= dict(zip(rows, uniforms(draw_seed(), len(rows) * 6).view(-1, 1, 6, 1), strict=True))
    terms = []
    for b, site in enumerate(sites):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        terms.append(plain_step(model, objective, one, site, by_example[b].double(), own=credit == "own"))
    plain = torch.cat(terms).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    same(gradients(objective, loss), gradients(objective, plain))


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_several_draws_are_the_mean_of_the_plain_steps_of_each(
    masking: str, make: Any, call: Any, model: nn.Module, inputs: dict
) -> None:
    sites = [3, 1, 2, 1, 1, 2]  # of three examples, and of the same three again
    objective = make(masking, with_recipe(draw="example", draws=2), sites)
    torch.manual_seed(SEED)
    loss = call(objective, inputs)
    torch.manual_seed(SEED)
    by_draw: dict[int, Tensor] = {}
    if masking == "input":
        u = uniforms(draw_seed(), 6 * 6 * 4).view(6, 6, -1)
        by_draw = {d: u[d : d + 1, :, : site + 1] for d, site in enumerate(sites)}
    else:
        for site in (1, 2, 3):
            rows = [d for d, s in enumerate(sites) if s == site]
            by_draw |= dict(zip(rows, uniforms(draw_seed(), len(rows) * 6).view(-1, 1, 6, 1), strict=True))
    terms = []
    for d, site in enumerate(sites):
        one = {name: value[d % 3 : d % 3 + 1] for name, value in inputs.items()}
        terms.append(plain_step(model, objective, one, site, by_draw[d].double()))
    plain = torch.cat(terms).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-9)
    same(gradients(objective, loss), gradients(objective, plain))


@pytest.mark.parametrize(("masking", "parting"), [("input", 3), ("hidden", 1)])
def test_several_draws_share_a_clean_pass_up_to_where_they_part(
    masking: str, parting: int, make: Any, inputs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(masking, with_recipe(draw="example", draws=2), [3, 1, 2, 1, 1, 2])
    run, passes = objective.patched.run, []
    output = run(inputs).output
    known = kind_of(output).tables(output, inputs)

    def watched(given: dict, **asked: Any) -> Any:
        passes.append((len(given["input_ids"]), asked.get("stop")))
        return run(given, **asked)

    monkeypatch.setattr(objective.patched, "run", watched)
    objective.remembered = SimpleNamespace(get=lambda numbers: known)
    objective(**inputs, example=EXAMPLES)
    assert passes == [(3, parting), (6, None)]


def test_credit_changes_the_gradients_of_the_lower_heads_only(make: Any, inputs: dict) -> None:
    results = {}
    for credit in ("all", "own"):
        objective = make("input", with_recipe(credit=credit), [2] * 3)
        torch.manual_seed(SEED)
        loss = objective(**inputs)["loss"]
        results[credit] = loss, gradients(objective, loss)
    torch.testing.assert_close(results["all"][0], results["own"][0], rtol=1e-14, atol=1e-14)
    every, own = results["all"][1], results["own"][1]
    lower = [name for name in every if name.startswith(("probe.heads.0.", "probe.heads.1."))]
    assert len(lower) == 12  # two heads of two weight-normed layers and two biases
    for name in every.keys() - set(lower):
        torch.testing.assert_close(own[name], every[name], rtol=1e-12, atol=1e-12)
    for name in lower:
        assert (own[name] - every[name]).abs().max() > 1e-6, name


def test_heads_above_the_drawn_site_and_frozen_weights_get_no_gradient(
    make: Any, model: nn.Module, inputs: dict
) -> None:
    objective = make("input", PUBLISHED, [1] * 3)
    got = gradients(objective, objective(**inputs)["loss"])
    assert not any(name.startswith(("probe.heads.2.", "probe.heads.3.")) for name in got)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("masking", "wanted"), [("input", {0, 1, 2}), ("hidden", {2})])
def test_only_the_states_that_the_probe_reads_are_captured(
    masking: str, wanted: set[int], make: Any, inputs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(masking, PUBLISHED, [2] * 3)
    run, captured = objective.patched.run, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        captured.append(set(result.states))
        return result

    monkeypatch.setattr(objective.patched, "run", watched)
    objective(**inputs)
    assert captured == [wanted, set()]  # the clean pass and the masked one


@pytest.mark.parametrize("draw", ["batch", "example"])
def test_every_site_is_drawn_and_none_that_is_not_there(draw: str, make: Any) -> None:
    objective = make("hidden", with_recipe(draw=draw))
    torch.manual_seed(0)
    drawn = [objective.draw_sites(8) for _ in range(100)]
    assert all(sites.shape == (8,) and sites.dtype == torch.int64 for sites in drawn)
    # batch: the chance that one of four sites never comes in 100 draws is below 4 * 0.75^100 = 2e-12
    assert set(torch.cat(drawn).tolist()) == set(range(SITES))
    if draw == "batch":
        assert all((sites == sites[0]).all() for sites in drawn)
    else:  # all sites alike urgent: eight examples give each of the four sites two
        assert all(sites.sort().values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] for sites in drawn)


def test_a_draw_by_example_does_not_tie_a_site_to_a_place_in_the_batch(make: Any) -> None:
    objective = make("hidden", with_recipe(draw="example"))
    torch.manual_seed(0)
    first = {int(objective.draw_sites(4)[0]) for _ in range(100)}
    assert first == set(range(SITES))


def test_the_same_global_generator_repeats_a_step_to_the_bit(make: Any, inputs: dict) -> None:
    losses = []
    for _ in range(2):
        objective = make("input", with_recipe(draw="example", credit="own"))
        torch.manual_seed(SEED)
        losses.append(objective(**inputs)["loss"])
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], objective(**inputs)["loss"])  # the next step draws other gates


def test_processes_draw_different_gates_from_the_same_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for rank in (None, 0, 1, 2, 7):
        if rank is not None:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(SEED)
        seeds.append(rank_seed(torch.device("cpu")))
    assert torch.equal(seeds[0], seeds[1])  # the first process draws what a process alone does
    draws = [uniforms(seed, 1000) for seed in seeds[1:]]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # of 1000 pairs of uniforms from 2^23 values about 1e-4 coincide
            assert (one == other).sum() <= 1


ON_CPU = [name for name, entry in backends.BACKENDS.items() if entry.device != "cuda"]


@pytest.mark.parametrize("backend", [name for name in ON_CPU if backends.available()[name] is None])
def test_a_gate_that_is_always_open_is_exactly_one_and_gets_no_gradient(backend: str) -> None:
    states, baseline = torch.randn(2, 500, 8), torch.randn(8, requires_grad=True)
    logits = torch.full((2, 500, 3), ALWAYS_OPEN, requires_grad=True)
    mixed, gates, log_open = gate_mix(states, logits, baseline, torch.tensor([3, 4]), backend=backend)
    assert (gates == 1).all() and (log_open == 0).all() and torch.equal(mixed, states)
    (mixed.sum() + gates.sum() + log_open.sum()).backward()
    assert (logits.grad == 0).all() and (baseline.grad == 0).all()


@pytest.mark.parametrize("broken", ["states", "prediction"])
def test_nan_is_a_floating_point_error(broken: str, tiny_bert: Any, inputs: dict) -> None:
    model = tiny_bert()
    weights = model.bert.encoder.layer[0].output.dense if broken == "states" else model.classifier
    weights.weight.data.fill_(torch.nan)
    with frozen(model), patch(model) as patched:
        objective = Objective(patched, a_probe("input").float(), PUBLISHED)
        objective.draw_sites = lambda examples: torch.full((examples,), 3)
        with pytest.raises(FloatingPointError, match="NaN or infinity"):
            objective(**inputs)


def test_an_exploded_probe_is_a_floating_point_error(make: Any, inputs: dict) -> None:
    objective = make("hidden", PUBLISHED, [1] * 3)
    objective.probe.baselines[1].data.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the learning rate is too high"):
        objective(**inputs)


def test_the_multipliers_watch_in_training_only(make: Any, inputs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, seen = make("input", PUBLISHED), []
    monkeypatch.setattr(objective.multipliers, "observe", lambda *args: seen.append(args))
    objective.eval()(**inputs)
    assert not seen
    objective.train()(**inputs)
    assert len(seen) == 1


def test_a_pull_leaves_the_value_and_lifts_the_gradient_of_open_gates_only() -> None:
    logits = torch.linspace(-6, 8, 29, dtype=torch.float64, requires_grad=True)
    plain = log_open(logits)
    assert torch.equal(pulled(plain, logits, 0.25), plain)
    (gradient,) = torch.autograd.grad(pulled(plain, logits, 0.25).sum(), logits)
    torch.testing.assert_close(gradient, (1 - plain.exp()).clamp(min=0.25))


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_step_pulls_on_the_gates_of_the_drawn_site(masking: str, make: Any, inputs: dict) -> None:
    moved = {}
    for pull in (0.0, 0.9):
        objective = make(masking, with_recipe(pull=pull, credit="own"), [2, 2, 2])
        torch.manual_seed(SEED)
        loss = objective(**inputs)["loss"]
        moved[pull] = loss.detach(), gradients(objective, loss)
    (plain_loss, plain), (pulled_loss, strong) = moved[0.0], moved[0.9]
    torch.testing.assert_close(pulled_loss, plain_loss)
    assert strong["probe.heads.2.bias"] > plain["probe.heads.2.bias"]
    others = [name for name in plain if "heads.2." not in name]
    assert others and all(torch.equal(plain[name], strong[name]) for name in others)


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_pull_by_share_grows_with_what_an_example_drops(masking: str, make: Any, inputs: dict) -> None:
    objective = make(masking, with_recipe(pull=0.5, pull_by="share"))
    opens = torch.tensor([[0.9, 0.7, 0.8, 0.6, 0.2, 0.2], [0.5] * 4 + [0.0] * 2, [1.0] * 5 + [0.0]]).log()
    pull = objective.pull_on(opens, inputs["attention_mask"])
    torch.testing.assert_close(pull, 0.5 * torch.tensor([[2.6 / 6], [0.5], [0.0]]))


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_warmer_step_draws_warmer_gates(masking: str, make: Any, inputs: dict) -> None:
    drawn = {}
    for temperature in (0.2, 5.0):
        objective = make(masking, with_recipe(temperature=temperature), [2, 2, 2])
        state, logits = torch.zeros(3, 6, WIDTH).double(), torch.zeros(3, 6, 1).double()
        torch.manual_seed(SEED)
        drawn[temperature] = objective.draw(state, logits, objective.probe.baseline(2))
        torch.manual_seed(SEED)
        plain = gate_mix(state, logits, objective.probe.baseline(2), draw_seed(), temperature=temperature)
        assert all(torch.equal(one, other) for one, other in zip(drawn[temperature], plain, strict=True))
        objective(**inputs)["loss"].backward()
    inside = {key: ((0 < each.gates) & (each.gates < 0.98)).sum() for key, each in drawn.items()}
    assert inside[5.0] > inside[0.2]


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_straight_gradient_leaves_the_value_and_opens_shut_gates(masking: str, make: Any) -> None:
    logits = torch.tensor([[-9.0, -8.0], [0.0, 3.0], [9.0, 8.0]], dtype=torch.float64).expand(3, 3, 2).contiguous()
    state = torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {}
    for gradient in ("path", "straight"):
        objective = make(masking, with_recipe(gradient=gradient))
        leaf, baseline = logits.clone().requires_grad_(), objective.probe.baseline(0)
        torch.manual_seed(SEED)
        drawn = objective.draw(state, leaf, baseline)
        found[gradient] = drawn, *torch.autograd.grad(drawn.mixed.sum(), (leaf, baseline))
    (path, along, to_baseline), (straight, through, same_baseline) = found["path"], found["straight"]
    assert torch.equal(path.mixed, straight.mixed) and torch.equal(to_baseline, same_baseline)
    assert (along[:, [0, 2]].abs() < 1e-9).all()  # drawn shut and open
    moves = (state - objective.probe.baseline(0)).sum(-1, keepdim=True)
    opens = log_open(logits).exp()
    gate = path.gates[..., -1:]  # both gates' product
    saturated = (gate <= 0) | (gate > module.NEARLY_OPEN)
    torch.testing.assert_close(through, torch.where(saturated, along + opens * (1 - opens) * moves, along))


def with_biases(objective: Objective, biases: list[float]) -> Objective:
    """Each head's gates are as open as its bias says, up to a little."""
    for head, bias in zip(objective.probe.heads, biases, strict=True):
        head.bias.data.fill_(bias)
        head.bound = 0.1
    return objective


def test_gates_that_leave_nothing_to_chance_are_decided_as_they_are_drawn(make: Any, inputs: dict) -> None:
    losses = []
    for below in ("drawn", "decided"):
        objective = with_biases(make("input", with_recipe(below=below, credit="own"), [3, 2, 1]), [40, 40, -40, 1])
        torch.manual_seed(SEED)
        losses.append(objective(**inputs)["loss"])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_what_is_decided_below_does_not_depend_on_the_draw(make: Any, inputs: dict) -> None:
    differ = {}
    for below in ("drawn", "decided"):
        objective = with_biases(make("input", with_recipe(below=below), [3] * 3), [0.5, 0.5, 0.5, 40])
        drawn = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            drawn.append(objective(**inputs)["loss"])
        differ[below] = (drawn[0] - drawn[1]).abs().item()
    assert differ["decided"] < 1e-12 < differ["drawn"]


@pytest.mark.parametrize("bias", [3.0, -2.0])
def test_a_decided_gate_hears_from_above_only_if_it_is_shut(bias: float, make: Any, inputs: dict) -> None:
    recipe = with_recipe(below="decided", credit="own", gradient="straight")
    objective = with_biases(make("input", recipe, [1] * 3), [bias, 3.0, 3.0, 3.0])
    torch.manual_seed(SEED)
    got = gradients(objective, objective(**inputs)["loss"])
    heard = max(each.abs().max().item() for name, each in got.items() if name.startswith("probe.heads.0."))
    assert (heard > 0) == (bias < 0)
    assert got["probe.heads.1.bias"] != 0


def test_decided_follows_the_probes_own_rule_and_reopens_a_little() -> None:
    law_half = TEMPERATURE * math.log(0.2 / 1.2)  # the logit of P(z != 0) = 0.5, whatever a training's temperature is
    logits = torch.tensor([[[law_half + 0.1, law_half - 0.1, 2.0]]], dtype=torch.float64, requires_grad=True)
    below = torch.tensor([True, True, False])
    fixed, asked = module.decided(logits, below, log_open(logits[..., 2], 0.67), 0.67)
    assert fixed.tolist() == [[[module.ALWAYS_OPEN, module.ALWAYS_SHUT, 2.0]]]
    (gradient,) = torch.autograd.grad(asked.sum(), logits)
    p = log_open(logits.detach(), 0.67).exp()
    slope = p * (1 - p)
    expected = torch.stack([0 * slope[..., 0], module.REOPENED * slope[..., 1], slope[..., 2]], -1)
    torch.testing.assert_close(gradient, expected)


def test_progress_widens_the_bound_and_lets_the_pull_fade(make: Any) -> None:
    objective = make("input", with_recipe(pull=0.2, initial_bound=3.0, bound=10.0))
    seen = []
    for progress in (0.0, 0.2, 0.4, 1.0):
        objective.set_progress(progress)
        seen.append((objective.probe.heads[0].bound, objective.pull))
    assert seen == [pytest.approx(pair) for pair in ((3, 0.2), (6.5, 0.16), (10, 0.12), (10, 0))]


def test_statistics_are_means_per_site_since_the_last_look() -> None:
    statistics = module.Statistics(3)
    statistics.add(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 0.75]))
    assert statistics.take() == {"kl_0": 1.0, "open_0": 0.5, "kl_2": 3.0, "open_2": 0.5}
    assert statistics.take() == {}
