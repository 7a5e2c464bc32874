"""Ask a method that needs no trained probe about texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffmask_fast.attribution.batch import Masked, check_finite, read_batch, say
from diffmask_fast.attribution.methods import METHODS, Found, method_named
from diffmask_fast.attribution.over_texts import checked, over_texts
from diffmask_fast.attribution.result import Attributions
from diffmask_fast.data import Examples
from diffmask_fast.moments import Moments, state_moments
from diffmask_fast.sites import Patched, Site, sites_of


@torch.no_grad()
def attribute(
    model: nn.Module,
    texts: Examples | Sequence[str | tuple[str, str]],
    tokenizer: Any = None,
    *,
    method: str,
    sites: Sequence[int | str] | None = None,
    moments: Mapping[int, Moments] | None = None,
    batch_size: int = 16,
    meta: dict[str, Any] | None = None,
    show_progress: bool = False,
    shared: bool = False,
    **options: Any,
) -> Attributions:
    """Which tokens matter for the prediction, by their state at each site, says one of the methods beside DiffMask.

    Args:
        model: the trained model; it is left as it was.
        texts, tokenizer, batch_size, meta, show_progress, shared: as in `explain`.
        method: a name in `METHODS`.
        sites: numbers or names of the sites to explain; by default all that the method can.
        moments: of the states at these sites over a data set, see `state_moments`; by default over `texts`. A dropped
            state is replaced by their mean, unless the method learns what replaces it.
        options: of the method, see its function.

    Returns:
        `Attributions` with `masking` "hidden": at each site its own states are explained. Of methods that give scores,
        `keep` is the size of a score as a share of the largest of its text and site.

    Raises:
        TypeError, ValueError: as `explain`; an unknown method, site or option; moments that lack a site.

    Example:
        >>> result = attribute(model, ["a fine film"], tokenizer, method="integrated-gradients", sites=["embedding"])
        >>> result[0].tokens, result[0].scores  # (T, 1)
    """
    function = method_named(method)
    known = list(inspect.signature(function).parameters)[3:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    texts = checked(model, texts, tokenizer)
    chosen = chosen_sites(sites_of(model), sites, method)
    homes = state_moments(model, texts, chosen) if moments is None else moments
    without = [site for site in chosen if site not in homes]
    if without:
        raise ValueError(f"moments has none of the sites {without}: take them at all that are explained: {chosen}")
    device = next(model.parameters()).device

    def prepare(patched: Patched, examples: Examples) -> Callable[[list[int]], list[dict[str, Any]]]:
        def read(numbers: list[int]) -> list[dict[str, Any]]:
            batch = read_batch(patched, examples, numbers, chosen, device)
            found = ((site, function(batch, site, homes[site], **options)) for site in chosen)
            masked = (as_masked(one, site, homes[site].mean, batch.real, method) for site, one in found)
            return say(batch, [len(examples.tokens[i]) for i in numbers], masked)

        return read

    return over_texts(
        model,
        texts,
        None,
        prepare,
        method=method,
        masking="hidden",
        sites=chosen,
        batch_size=batch_size,
        meta=meta,
        show_progress=show_progress,
        shared=shared,
    )


def chosen_sites(there: Sequence[Site], sites: Sequence[int | str] | None, method: str) -> list[int]:
    """The numbers of the sites asked for, or of all that the method can explain."""
    names = [site.name for site in there]
    possible = [i for i, site in enumerate(there) if not METHODS[method].layers_only or site.side == "input"]
    if not possible:
        raise ValueError(
            f"{method} explains states that enter a layer, and no site of this model does: it has "
            f"{', '.join(map(str, there))}; use another method"
        )
    if sites is None:
        return possible
    if isinstance(sites, str) or not len(sites):
        raise ValueError(f"sites is {sites!r}; expected a list of at least one of {', '.join(names)}")
    chosen = []
    for site in sites:
        number = names.index(site) if site in names else site
        if not isinstance(number, int) or isinstance(number, bool) or number not in possible:
            allowed = ", ".join(f"{i} ({names[i]})" for i in possible)
            raise ValueError(f"{method} can't explain site {site!r}; expected one of {allowed}")
        chosen.append(number)
    return chosen


def as_masked(found: Found, site: int, home: Tensor, real: Tensor, method: str) -> Masked:
    """What a method found, in the terms that all results have in common."""
    baseline = home if found.baseline is None else found.baseline
    if found.scores is None:
        assert found.keep is not None
        return Masked(site, baseline, found.keep * real, None, found.details)
    scores = found.scores.masked_fill(real == 0, 0)
    check_finite(scores, f"what {method} says about site {site}")
    largest = scores.abs().amax(-1, keepdim=True)
    return Masked(
        site, baseline, scores.abs() / largest.clamp(min=torch.finfo(scores.dtype).tiny), scores, found.details
    )
