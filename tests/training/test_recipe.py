from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from diffmask_fast.tasks import squad, sst, toy
from diffmask_fast.training.recipe import CHOICES, OPTIONAL, PARTS, POSITIVE, SHARES, WHOLE, Recipe


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_there_is_not_is_refused_with_those_there_are(name: str) -> None:
    choices: dict[str, Any] = {name: "other"}
    with pytest.raises(ValueError, match=f"{name} is 'other'; expected one of {', '.join(CHOICES[name])}"):
        Recipe(**choices)


@pytest.mark.parametrize("name", [*POSITIVE, *OPTIONAL])
@pytest.mark.parametrize("value", [0, -1.5, float("nan")])
def test_a_number_that_is_not_above_0_is_refused(name: str, value: float) -> None:
    numbers: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; expected a number above 0")):
        Recipe(**numbers)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number_is_refused(name: str) -> None:
    numbers: dict[str, Any] = {name: 1.5}
    with pytest.raises(ValueError, match=f"{name} is 1.5; expected a whole number"):
        Recipe(**numbers)


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused(name: str, value: float) -> None:
    shares: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a number from 0 to 1"):
        Recipe(**shares)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [0, 1.5, float("nan")])
def test_what_is_no_part_is_refused(name: str, value: float) -> None:
    parts: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a number above 0, of at most 1"):
        Recipe(**parts)


def test_every_recipe_can_be_made_again_from_what_a_run_saves() -> None:
    by_masking = (*sst.RECIPES.values(), *squad.RECIPES.values())
    recipes = [*toy.RECIPES.values(), *(recipe for of in by_masking for recipe in of.values())]
    assert all(Recipe(**recipe.to_dict()) == recipe for recipe in recipes)
    assert {field.name for field in fields(Recipe)} >= {*CHOICES, *POSITIVE}
