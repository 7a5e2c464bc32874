"""Probes: small networks that read hidden states and say, for every token, how open its gate is.

A probe has one `GateHead` per site. Masking decides how the heads work together:

* input masking: head i reads [x_0; x_i]; the state at site 0 is gated by the product of the gates 0..k;
* hidden masking: head k reads x_k; the state at site k is gated by that gate alone.

De Cao et al. 2020, section 2.2 and appendix A.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from diffmask_fast.files import replacing
from diffmask_fast.ops import Head, probe_logits

MASKINGS = ("input", "hidden")
_FORMAT = "diffmask_fast.probe"


class GateHead(nn.Module):
    """Weight-normed Linear - tanh - weight-normed Linear, one gate logit per token.

    Args:
        features: width of what the head reads.
        width: hidden width; the paper takes a quarter of the state's width.
        bound: None leaves the logit unbounded; a number passes it through `bound * tanh(.)`, as the paper's
            input variant does with 10.
        bias: initial, trainable logit of a gate, so that every gate starts open. The paper takes 5.
        standardised: the head reads its features less `mean`, divided by `spread`, two buffers (features,) that the one
            who makes the head fills in. The family of functions stays the same, but states far from 0 with a few loud
            dimensions, as Transformers have them, no longer slow the training down.
    """

    mean: Tensor | None
    spread: Tensor | None

    def __init__(self, features: int, width: int, bound: float | None, bias: float, standardised: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features) if standardised else None)
        self.register_buffer("spread", torch.ones(features) if standardised else None)
        self.inner = weight_norm(nn.Linear(features, width))
        self.outer = weight_norm(nn.Linear(width, 1, bias=False))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.bound = bound

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, features) -> logits (B, T)."""
        return probe_logits([features], [self.parts()], bound=self.bound).squeeze(-1)

    def parts(self) -> Head:
        """The parameters as `probe_logits` takes them."""
        inner, outer = self.inner.parametrizations["weight"], self.outer.parametrizations["weight"]
        magnitude, direction, shift = inner.original0, inner.original1, self.inner.bias
        if self.mean is not None and self.spread is not None:  # folded in, which costs no pass over the states
            direction = magnitude * direction / direction.norm(dim=1, keepdim=True) / self.spread
            magnitude, shift = direction.norm(dim=1, keepdim=True), shift - direction @ self.mean
        return Head(magnitude, direction, shift, outer.original0, outer.original1, self.bias)


class Probe(nn.Module):
    """Gate heads and baselines for the sites of one model.

    Args:
        sizes: width of the state at each site, in the order of the sites.
        masking: "input" or "hidden".
        width: hidden width of the heads; by default a quarter of the widest state, at least 8.
        bound: see `GateHead`; by default 10 for input masking and None for hidden masking, as in the paper.
        bias: initial gate logit.
        standardised: see `GateHead`; `fresh_probe` fills in what the states of a model are like.

    Raises:
        ValueError: an unknown masking, no sites, or a width below 1.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        masking: str = "input",
        *,
        width: int | None = None,
        bound: float | None = None,
        bias: float = 5.0,
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.meta: dict[str, Any] = {}
        if masking not in MASKINGS:
            raise ValueError(f"masking is {masking!r}; expected one of {', '.join(MASKINGS)}")
        if not sizes or any(size < 1 for size in sizes):
            raise ValueError(f"sizes is {list(sizes)}; expected the width of the state at each site, at least one")
        if width is not None and width < 1:
            raise ValueError(f"width is {width}; expected 1 or more, or None for a quarter of the widest state")
        self.sizes = tuple(int(size) for size in sizes)
        self.masking = masking
        self.width = width or max(8, max(sizes) // 4)
        self.bound = bound if bound is not None or masking == "hidden" else 10.0
        self.initial_bias = float(bias)
        self.standardised = standardised
        reads = [size + (sizes[0] if masking == "input" else 0) for size in sizes]
        self.heads = nn.ModuleList(GateHead(read, self.width, self.bound, bias, standardised) for read in reads)
        replaced = sizes[:1] if masking == "input" else sizes
        self.baselines = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in replaced)

    def set_bound(self, bound: float | None) -> None:
        """Give all heads another bound; the one of the constructor is what a saved probe has."""
        for head in self.heads:
            assert isinstance(head, GateHead)
            head.bound = bound

    @property
    def num_sites(self) -> int:
        return len(self.sizes)

    def target(self, site: int) -> int:
        """The site whose state is replaced when `site` is the deepest that the probe may look at."""
        return 0 if self.masking == "input" else site

    def reads(self, site: int) -> range:
        """The sites whose states `logits(states, site)` needs."""
        return range(site + 1) if self.masking == "input" else range(site, site + 1)

    def baseline(self, site: int) -> nn.Parameter:
        """The learned vector (H,) that replaces a dropped state when the probe looks at `site`."""
        return self.baselines[self.target(site)]

    def logits(self, states: Mapping[int, Tensor], site: int) -> Tensor:
        """Gate logits of the gates that multiply at `site`.

        Args:
            states: the state (B, T, H) at each site of `reads(site)`.
            site: the deepest site that the probe may look at.

        Returns:
            (B, T, site + 1) for input masking, (B, T, 1) for hidden masking.
        """
        if not 0 <= site < self.num_sites:
            raise ValueError(f"site is {site}; this probe has the sites 0 to {self.num_sites - 1}")
        dtype = self.baselines[0].dtype
        read = [states[i] for i in self.reads(site)]
        if len({state.dtype for state in read}) > 1 or torch.float64 in (read[0].dtype, dtype):
            read = [state.to(dtype) for state in read]
        for i, state in zip(self.reads(site), read, strict=True):
            if state.shape[-1] != self.sizes[i]:
                raise ValueError(
                    f"the state at site {i} is {state.shape[-1]} wide; this probe was made for {self.sizes[i]}: "
                    "use the model that it was trained on"
                )
        heads = [head for i, head in enumerate(self.heads) if i in self.reads(site) and isinstance(head, GateHead)]
        first = read[0] if self.masking == "input" else None
        return probe_logits(read, [head.parts() for head in heads], first, bound=heads[0].bound)

    def config(self) -> dict[str, Any]:
        """What `Probe(**config)` needs to build the same probe."""
        return {
            "sizes": list(self.sizes),
            "masking": self.masking,
            "width": self.width,
            "bound": self.bound,
            "bias": self.initial_bias,
            "standardised": self.standardised,
        }


def save_probe(probe: Probe, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
    """Write a probe to one safetensors file, its configuration and `meta` as JSON in the file's metadata.

    The file is written whole or not at all.
    """
    from safetensors.torch import save_file

    described = json.dumps({"format": _FORMAT, "probe": probe.config(), "meta": dict(meta or {})})
    tensors = {name: value.detach().cpu().contiguous() for name, value in probe.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"diffmask_fast": described})


def load_probe(path: str | os.PathLike[str]) -> Probe:
    """Read what `save_probe` wrote. `probe.meta` holds what was saved with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a probe, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file; a run leaves its probe as probe.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("diffmask_fast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a probe, or it is cut short ({error})") from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that save_probe wrote")
    try:
        if not all(value.isfinite().all() for value in tensors.values()):
            raise ValueError("some of its numbers are NaN or infinite")
        probe = Probe(**described["probe"])
        probe.load_state_dict(tensors)
        if any((buffer <= 0).any() for name, buffer in probe.named_buffers() if name.endswith("spread")):
            raise ValueError("some spread of the states is not above 0")
        probe.meta = described["meta"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return probe.eval()
