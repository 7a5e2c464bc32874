"""Recipes: every number that decides how a probe is trained, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from diffmask_fast.ops.reference import TEMPERATURE

CHOICES = {
    "draw": ("batch", "example"),
    "credit": ("all", "own"),
    "below": ("drawn", "decided"),
    "bias_of": ("gate", "product"),
    "pull_by": ("gate", "share"),
    "gradient": ("path", "straight"),
    "multiplier": ("ascent", "control", "shared"),
    "optimizer": ("adam", "lookahead-rmsprop"),
}
POSITIVE = (
    *("tolerance", "margin", "temperature", "bound", "initial_multiplier", "multiplier_rate", "largest_multiplier"),
    *("learning_rate", "baseline_learning_rate", "epochs", "batch_size", "draws"),
)
WHOLE = ("batch_size", "draws")
OPTIONAL = ("initial_margin", "initial_bound")  # above 0, or None
SHARES = ("pull", "corrupted")  # from 0 to 1
PARTS = ("lowest_aim",)  # above 0, to 1


def recipe_named(name: str, recipes: dict[str, Recipe]) -> Recipe:
    """The recipe of that name; ValueError lists the names there are."""
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}; expected one of {', '.join(recipes)}")
    return recipes[name]


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained.

    Attributes:
        tolerance: the KL (nats, mean over examples) that the masked prediction may differ by.
        margin: the share of the tolerance that the controller aims at: the constraint is to hold on texts that the
            probe was not trained on, where the divergence is larger.
        initial_margin: the margin for the first quarter of the training, from where it falls to `margin` until 0.65 of
            it is done. A larger one lets gates shut first, and then open those again that are missed. None keeps it
            constant.
        lowest_aim: the share of the aim that the lowest site has; it grows evenly to all of it at the deepest. What is
            dropped at one site of inputs is missing at all above, which need some of the tolerance for themselves.
        corrupted: the share of the training texts' tokens that are replaced by the mask token, see
            `Examples.corrupted`. A model is surer of texts that it was fine-tuned on than of new ones, and needs less
            of them; a few missing words make it as unsure as it is of new ones.
        temperature: of the draws while training. The larger it is, the more gates are neither 0 nor 1, and the rest get
            no gradient. A probe is always used with the law's own temperature.
        standardised: heads read states less their mean, divided by their spread, see `GateHead`.
        bias, bound: of the gate heads, see `GateHead`.
        bias_of: whose logit the bias is: "gate" each gate's, "product" about that of all gates that multiply at the
            deepest site, so that the deepest of many sites starts as open as the only one of a single.
        initial_bound: the bound at the start; it reaches `bound` when 0.4 of the training is done. None keeps it
            constant. A gate that is shut gets no gradient, so none must be before much is learned.
        pull: the least that the sparsity's gradient for a logit is at the start, fading to 0 at the end. The gradient
            itself, 1 - P(z != 0), would leave gates that are nearly open where they are.
        pull_by: "gate" pulls at each gate alike, "share" the more at an example's gates the more of them are shut:
            where every token is needed none is dropped at random, which all sites above would pay for.
        gradient: "path" is the derivative along a draw, 0 where it is saturated. With "straight" a saturated gate
            passes on that of its P(z != 0), so that a shut one can open again (the straight-through estimator of
            Bengio et al. 2013).
        draw: "batch" draws one site for all examples of a step, "example" one for each, the oftener the further a site
            is over the tolerance.
        credit: "all" lets the sparsity of a site train the gates of all sites that multiply there; "own" lets it
            train that site's own gate only. The KL trains all of them either way, unless they are `below` and decided.
        below: of the gates that multiply at a site of inputs, those below it are "drawn" as its own is, or "decided": 1
            or 0, as an attribution takes them, so that the site learns without their noise. The KL then trains no gate
            that is open below, and opens shut ones a little.
        multiplier: "ascent" is gradient ascent by the optimiser, clamped; "control" is a proportional-integral
            controller of the multiplier's logarithm, see `training.multipliers`; "shared" is that with one multiplier
            for all sites, an ablation.
        initial_multiplier: where the multipliers start.
        multiplier_rate: learning rate of the ascent, or integral gain a draw of the controller.
        largest_multiplier: where they are clamped.
        optimizer: "adam" or "lookahead-rmsprop".
        learning_rate, baseline_learning_rate: of the gate heads and of the baselines.
        schedule, warmup_steps: learning-rate schedule by its Hugging Face name.
        epochs: passes over the data.
        batch_size: examples a step.
        draws: of gates for each example in a step, each at a site of its own where `draw` is "example". They share what
            does not depend on the gates, but tell less than draws on different texts (docs/performance.md).
    """

    tolerance: float = 1.0
    margin: float = 0.5
    initial_margin: float | None = None
    lowest_aim: float = 1.0
    corrupted: float = 0.0
    temperature: float = TEMPERATURE
    standardised: bool = False
    bias: float = 5.0
    bias_of: str = "gate"
    bound: float = 10.0
    initial_bound: float | None = 3.0
    pull: float = 0.25
    pull_by: str = "gate"
    gradient: str = "path"
    draw: str = "example"
    credit: str = "own"
    below: str = "drawn"
    multiplier: str = "control"
    initial_multiplier: float = 1.0
    multiplier_rate: float = 0.01
    largest_multiplier: float = 100.0
    optimizer: str = "adam"
    learning_rate: float = 4e-3
    baseline_learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    epochs: float = 2.0
    batch_size: int = 8
    draws: int = 1

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        given = [name for name in OPTIONAL if getattr(self, name) is not None]
        for name in (*POSITIVE, *given):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number above 0")
        for name in WHOLE:
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a whole number")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number from 0 to 1")
        for name in PARTS:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number above 0, of at most 1")

    def to_dict(self) -> dict:
        return asdict(self)


# What the tasks' own settings for inputs have in common: the gates of many sites multiply (docs/recipe.md)
INPUT = Recipe(
    margin=0.85,
    initial_margin=1.5,
    corrupted=0.1,
    temperature=0.67,
    standardised=True,
    bias_of="product",
    bound=12.0,
    pull=0.5,
    pull_by="share",
    gradient="straight",
    multiplier_rate=0.03,
    learning_rate=3e-3,
    warmup_steps=50,
)

# What the tasks' published settings have in common (github.com/nicola-decao/diffmask)
PUBLISHED = Recipe(
    bias=5.0,
    bound=10.0,
    initial_bound=None,
    pull=0.0,
    draw="batch",
    credit="all",
    multiplier="ascent",
    initial_multiplier=1.0,
    multiplier_rate=0.3,
    largest_multiplier=200.0,
    optimizer="lookahead-rmsprop",
    learning_rate=3e-4,
    baseline_learning_rate=1e-3,
    schedule="constant_with_warmup",
)
