"""The methods that explain a text by itself, with no probe trained on a data set: one module each, one table of all.

A method is a function `(batch, site, home, **options) -> Found`: what it says about the tokens of each text of a batch
by their state at one site. What it says about a text does not depend on the others in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Found:
    """What a method found at one site: either `keep` or `scores`.

    Attributes:
        keep: (B, T) in [0, 1], of methods that choose tokens.
        scores: (B, T), finite, of methods that weigh them; what is at padded places does not count.
        baseline: what replaces a dropped state, (H,) or (B, 1, H), of methods that learn it.
        details: (B,) for each thing that the method reports about a text.
    """

    keep: Tensor | None = None
    scores: Tensor | None = None
    baseline: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """Where a method's function stands, and which sites it can explain: all, or those that enter a layer."""

    module: str
    function: str
    layers_only: bool = False


METHODS = {
    "leave-one-out": Method("gradients", "leave_one_out"),
    "integrated-gradients": Method("gradients", "integrated_gradients"),
    "schulz": Method("schulz", "schulz"),
    "guan": Method("guan", "guan"),
    "attention": Method("attention", "attention", layers_only=True),
    "erasure": Method("erasure", "erasure"),
    "diffmask-per-example": Method("per_example", "diffmask_per_example"),
    "reinforce": Method("per_example", "reinforce"),
}


def method_named(name: str) -> Callable[..., Found]:
    """The function of that method; its module, and what that needs, is imported only now.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    from importlib import import_module

    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; expected one of {', '.join(METHODS)}, or explain with a probe")
    return getattr(import_module(f"{__name__}.{METHODS[name].module}"), METHODS[name].function)
