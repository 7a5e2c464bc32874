from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from diffmask_fast.training.multipliers import SMALLEST, URGENCY, Ascent, Control, multipliers_for
from diffmask_fast.training.recipe import Recipe

RECIPE = Recipe(tolerance=0.5, initial_multiplier=2.0, multiplier_rate=0.1, largest_multiplier=40.0)
ASCENT = replace(RECIPE, multiplier="ascent")
CONTROL = replace(RECIPE, multiplier="control", tolerance=0.5, margin=1.0)
SITES = torch.tensor([1, 1, 2])


def climb(multipliers: Ascent, divergence: torch.Tensor, steps: int = 1) -> None:
    optimizer = torch.optim.SGD([{"params": [multipliers.value], "lr": 1.0, "maximize": True}])
    for _ in range(steps):
        optimizer.zero_grad()
        multipliers.penalised(torch.zeros(3), divergence, SITES).mean().backward()
        optimizer.step()


def test_a_recipe_names_its_multipliers() -> None:
    assert isinstance(multipliers_for(ASCENT, 3), Ascent) and isinstance(multipliers_for(CONTROL, 3), Control)


@pytest.mark.parametrize("recipe", [ASCENT, CONTROL])
def test_multipliers_start_where_the_recipe_says(recipe: Recipe) -> None:
    torch.testing.assert_close(multipliers_for(recipe, 3).current(), torch.full((3,), 2.0))


def test_the_ascents_terms_are_the_lagrangian() -> None:
    multipliers = Ascent(3, ASCENT)
    multipliers.value.data.copy_(torch.tensor([1.0, 3.0, 5.0]))
    terms = multipliers.penalised(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 1.5, 0.25]), SITES)
    assert terms.tolist() == [-1.0, -2.0 + 3.0 * 1.0, -3.0 - 5.0 * 0.25]


def test_ascent_climbs_where_violated_falls_where_slack_and_rests_elsewhere() -> None:
    multipliers = Ascent(3, ASCENT)
    climb(multipliers, torch.tensor([1.5, 1.5, 0.0]))
    # the mean over three examples: site 1 is over by 1 twice, site 2 under by 0.5 once
    torch.testing.assert_close(multipliers.current(), torch.tensor([2.0, 2.0 + 2 / 3, 2.0 - 0.5 / 3]))


def test_ascent_is_clamped_at_both_ends() -> None:
    multipliers = Ascent(3, ASCENT)
    climb(multipliers, torch.tensor([1e3, 1e3, 0.0]), steps=100)
    assert multipliers.current().tolist() == [2.0, 40.0, 0.0]
    climb(multipliers, torch.tensor([0.0, 0.0, 2.0]))  # and leaves the ends at once, with nothing wound up
    assert multipliers.current()[1] < 40.0 and multipliers.current()[2] > 0.0


def test_the_controllers_aim_falls_from_the_initial_margin_to_the_final_one() -> None:
    multipliers = Control(3, replace(CONTROL, tolerance=2.0, margin=0.5, initial_margin=1.5))
    aims = []
    for progress in (0.0, 0.25, 0.45, 0.65, 1.0):
        multipliers.set_progress(progress)
        assert multipliers.aim.unique().numel() == 1
        aims.append(multipliers.aim[0].item())
    assert aims == pytest.approx([3.0, 3.0, 2.0, 1.0, 1.0])
    assert Control(3, CONTROL).aim.tolist() == [0.5] * 3  # with one margin it stays


def test_a_lower_site_has_a_smaller_aim_and_pays_for_what_the_deepest_may() -> None:
    multipliers = Control(3, replace(CONTROL, lowest_aim=0.4))
    torch.testing.assert_close(multipliers.aim, torch.tensor([0.2, 0.35, 0.5]))
    everywhere = torch.arange(3)
    terms = multipliers.penalised(torch.zeros(3), torch.full((3,), 0.35), everywhere)
    assert terms[0] > 0 and terms[1].abs() < 1e-6 and terms[2] < 0
    multipliers.observe(torch.full((3,), 0.35), everywhere)
    started = math.log(CONTROL.initial_multiplier)
    moved = multipliers.integral - started
    torch.testing.assert_close(moved, CONTROL.multiplier_rate * torch.tensor([0.75, 0.0, -0.3]), rtol=1e-4, atol=1e-6)
    assert Control(1, replace(CONTROL, lowest_aim=0.4)).aim.item() == 0.5  # the only site is the deepest


def test_a_site_without_divergence_is_still_drawn_and_a_hopeless_one_does_not_take_all() -> None:
    multipliers = Control(3, CONTROL)
    multipliers.average.copy_(torch.tensor([0.0, 0.5, 50.0]))
    torch.testing.assert_close(multipliers.urgency(), torch.tensor([URGENCY[0], 1.0, URGENCY[1]]))


def test_a_site_that_may_do_little_is_drawn_the_less() -> None:
    multipliers = Control(3, replace(CONTROL, lowest_aim=0.4))
    multipliers.average.copy_(multipliers.aim)
    torch.testing.assert_close(multipliers.urgency(), torch.tensor([0.4, 0.7, 1.0]))


def observe(multipliers: Control, divergence: float, steps: int) -> torch.Tensor:
    for _ in range(steps):
        multipliers.observe(torch.full((3,), divergence), SITES)
    return multipliers.current()


def test_control_rises_at_every_step_of_a_violation() -> None:
    multipliers = Control(3, CONTROL)
    values = [observe(multipliers, 0.6, 1) for _ in range(20)]
    assert all((later[1:] > earlier[1:]).all() for earlier, later in pairwise(values))


def test_control_falls_at_every_step_of_slack() -> None:
    multipliers = Control(3, CONTROL)
    values = [observe(multipliers, 0.4, 1) for _ in range(20)]
    assert all((later[1:] < earlier[1:]).all() for earlier, later in pairwise(values))


def test_control_rests_where_the_constraint_just_holds() -> None:
    torch.testing.assert_close(observe(Control(3, CONTROL), 0.5, 50), torch.full((3,), 2.0))


@pytest.mark.parametrize("divergence", [0.0, 1e6])
def test_control_stays_within_its_bounds(divergence: float) -> None:
    multipliers = Control(3, CONTROL)
    current = observe(multipliers, divergence, 2000)
    assert (current <= 40.0).all() and (current >= 0.0).all()
    slack = math.log(SMALLEST) - 1e-5, math.log(40.0) + 1e-5  # float32 of the two logarithms
    assert ((multipliers.integral >= slack[0]) & (multipliers.integral <= slack[1])).all()
    # an anti-windup: sixty steps of the opposite move it off the end, however long it was there
    assert (observe(multipliers, 1.0 - min(divergence, 1.0), 60)[1:] != current[1:]).all()


def test_control_moves_the_drawn_sites_only() -> None:
    multipliers = Control(4, CONTROL)
    multipliers.observe(torch.tensor([5.0, 0.0]), torch.tensor([3, 1]))
    current = multipliers.current()
    assert current[0] == current[2] == Control(4, CONTROL).current()[0]
    assert current[3] > current[0] > current[1]


def test_control_sees_the_mean_of_a_sites_examples() -> None:
    one, three = Control(3, CONTROL), Control(3, CONTROL)
    one.observe(torch.tensor([0.8]), torch.tensor([1]))
    three.observe(torch.tensor([0.2, 0.8, 1.4]), torch.tensor([1, 1, 1]))
    torch.testing.assert_close(one.current(), three.current())


def test_one_hopeless_example_does_not_speak_for_the_site() -> None:
    far, farther = Control(3, CONTROL), Control(3, CONTROL)
    far.observe(torch.tensor([10 * 0.5]), torch.tensor([1]))
    farther.observe(torch.tensor([1e9]), torch.tensor([1]))
    assert torch.equal(far.current(), farther.current())


def test_control_scales_the_terms_so_that_no_sites_gradient_drowns_anothers() -> None:
    multipliers = Control(3, CONTROL)
    multipliers.integral.copy_(torch.tensor([-4.0, 0.0, 3.0]))
    sparsity = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    divergence = torch.tensor([0.5, 1.5, 0.25], requires_grad=True)
    multipliers.penalised(sparsity, divergence, torch.arange(3)).sum().backward()
    weight = multipliers.current() / (1 + multipliers.current())
    torch.testing.assert_close(sparsity.grad, 1 - weight)
    torch.testing.assert_close(divergence.grad, weight / 0.5)


@pytest.mark.parametrize("recipe", [ASCENT, CONTROL])
def test_a_state_dict_brings_the_multipliers_back_to_the_bit(recipe: Recipe) -> None:
    multipliers = multipliers_for(recipe, 3)
    if isinstance(multipliers, Ascent):
        climb(multipliers, torch.tensor([1.5, 1.5, 0.0]), 3)
    else:
        observe(multipliers, 0.7, 3)
    other = multipliers_for(recipe, 3)
    other.load_state_dict(multipliers.state_dict())
    assert torch.equal(other.current(), multipliers.current())
    for each in (multipliers, other):
        each.observe(torch.tensor([0.9, 0.1, 3.0]), SITES)
    assert torch.equal(other.current(), multipliers.current())


@pytest.mark.parametrize("recipe", [ASCENT, CONTROL])
def test_multipliers_in_float64_work_too(recipe: Recipe) -> None:
    multipliers = multipliers_for(recipe, 3).double()
    multipliers.observe(torch.ones(3, dtype=torch.float64), SITES)
    assert multipliers.current().dtype == torch.float64


def test_control_aims_at_the_margins_share_of_the_tolerance() -> None:
    multipliers = Control(3, replace(CONTROL, tolerance=2.0, margin=0.25, initial_multiplier=2.0))
    before = multipliers.current()
    multipliers.average.fill_(0.5)
    torch.testing.assert_close(observe(multipliers, 0.5, 50), torch.full((3,), 2.0))
    assert (before[1:] > multipliers.current()[1:]).all()  # it starts as if the tolerance were just used up


def test_a_shared_multiplier_is_one_for_all_sites_and_sees_the_mean_of_all_examples() -> None:
    shared, one = multipliers_for(replace(CONTROL, multiplier="shared"), 3), multipliers_for(CONTROL, 1)
    for divergences in ([0.9, 0.1, 3.0], [0.2, 0.4, 0.1]):
        shared.observe(torch.tensor(divergences), SITES)
        one.observe(torch.tensor([torch.tensor(divergences).mean()]), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(shared.current(), one.current().expand(3))
    assert shared.urgency().unique().numel() == 1
