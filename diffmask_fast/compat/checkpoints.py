"""Checkpoints of published DiffMask code: their gates, for the modules here, or as a `Probe` in our own format."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffmask_fast.compat.gates import NEW_NAMES
from diffmask_fast.probes import Probe, save_probe

PREFIX = "gate."
MAX_ACTIVATION = 10.0
SHIFTS = ("bias", "add_activation")
"""The trainable logit outside the tanh of a bounded gate network: DiffMask's name and Vision DiffMask's."""

_SATURATED = 20.0  # its tanh is 1, to the last bit of float64


class _Inert:
    """Stands for every class or function that a checkpoint names and that is no tensor: made, filled, never run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a checkpoint, on the CPU, read with `weights_only=True`: nothing in it is run.

    Objects that are neither tensors nor plain Python, such as configurations, come back as shells with
    attributes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of PyTorch.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    names = ["argparse.Namespace"]
    try:
        if zipfile.is_zipfile(path):  # of the older format the names can't be asked for
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(type("_Inert", (_Inert,), {}), name) for name in names]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__  # no advice of torch
        raise ValueError(f"{path} is not a checkpoint that can be read without running code ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a checkpoint: a dictionary with state_dict")
    return found


def rename_weight_norm(state: Mapping[str, Tensor], new: bool) -> dict[str, Tensor]:
    """A state_dict with the weight norm parameters named as by PyTorch's new parametrization, or by the old one."""
    renamed = {}
    for name, value in state.items():
        for later, earlier in NEW_NAMES.items():
            before, after = (earlier, later) if new else (later, earlier)
            if name == before or name.endswith(f".{before}"):
                name = name.removesuffix(before) + after
        renamed[name] = value
    return renamed


def gate_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gate's part of a checkpoint or of a state_dict, with the published names: for `load_state_dict` of a gate.

    Raises ValueError where there is no gate.
    """
    state = checkpoint.get("state_dict", checkpoint)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    gate = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    if not gate:
        gate = {name: value for name, value in tensors.items() if name.startswith(("g_hat.", "placeholder", "logits"))}
    if not gate:
        raise ValueError(f"there is no gate: expected names such as gate.g_hat.0.f.0.bias, found {list(state)[:5]}")
    return rename_weight_norm(gate, new=False)


def probe_of(gate: Mapping[str, Tensor], max_activation: float = MAX_ACTIVATION) -> Probe:
    """The probe that computes what a published gate does: the same logits and baselines.

    A bias inside the tanh of a bounded network, which a probe has none of, becomes a hidden unit that is always 1.

    Args:
        gate: as from `gate_state`, of a DiffMaskGateInput or DiffMaskGateHidden.
        max_activation: of its MLPMaxGates, which no checkpoint holds.

    Raises:
        ValueError: a gate that no probe can be: per sample, unbounded input masking, a placeholder that differs
            between positions; or parameters that are missing or don't fit.
    """
    if "logits" in gate:
        raise ValueError("this is a per-sample gate: logits of certain texts, and no network that could be a probe")
    layers = 1 + max((int(m[1]) for m in (re.match(r"g_hat\.(\d+)\.", name) for name in gate) if m), default=-1)
    try:
        placeholders = _placeholders(gate, layers)
        size, reads = placeholders[0].shape[-1], gate["g_hat.0.f.0.weight_v"].shape[1]
        masking = "input" if reads == 2 * size else "hidden"
        shift = next((name for name in SHIFTS if f"g_hat.0.{name}" in gate), None)
        if masking == "input" and shift is None:
            raise ValueError("these are unbounded gates (MLPGate) of input masking, and a probe's are bounded")
        inside = shift is not None and "g_hat.0.f.2.bias" in gate
        width = gate["g_hat.0.f.0.weight_v"].shape[0] + inside
        bound = None if shift is None else float(max_activation)
        probe = Probe([size] * layers, masking, width=width, bound=bound)
        state = {f"baselines.{i}": _one_vector(placeholder) for i, placeholder in enumerate(placeholders)}
        for i in range(layers):
            prefix = f"g_hat.{i}."
            own = {name.removeprefix(prefix): value for name, value in gate.items() if name.startswith(prefix)}
            state |= {f"heads.{i}.{name}": value for name, value in _head(own, shift, inside).items()}
        probe.load_state_dict(rename_weight_norm(state, new=True))
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the gate's parameters are not those of a published gate: {error}") from error
    return probe.eval()


def convert(path: str | os.PathLike[str], out: str | os.PathLike[str], max_activation: float | None = None) -> Probe:
    """Write the gate of a published checkpoint as a probe that `load_probe` reads; returns it.

    Its `meta` says from which file it came, and holds the checkpoint's multipliers and counts of steps and epochs.

    Args:
        path: a Lightning checkpoint, or a file of its state_dict.
        out: the .safetensors file to write.
        max_activation: see `probe_of`; by default what the checkpoint's hyperparameters say, else 10.

    Raises:
        FileNotFoundError, ValueError: see `read`, `gate_state` and `probe_of`.
    """
    checkpoint = read(path)
    if max_activation is None:
        parameters = checkpoint.get("hyper_parameters", checkpoint.get("hparams")) or {}
        known = parameters if isinstance(parameters, dict) else vars(parameters)
        max_activation = known.get("mul_activation", MAX_ACTIVATION)
    probe = probe_of(gate_state(checkpoint), max_activation)
    state = checkpoint.get("state_dict", checkpoint)
    alphas = [value for name, value in state.items() if name == "alpha" or name.startswith("alpha.")]
    multipliers = [number for alpha in alphas for number in alpha.flatten().tolist()]
    counts = {name: checkpoint[name] for name in ("epoch", "global_step") if isinstance(checkpoint.get(name), int)}
    meta = {"converted_from": os.path.basename(path), "multipliers": multipliers, **counts}
    save_probe(probe, out, meta)
    return probe


def _placeholders(gate: Mapping[str, Tensor], layers: int) -> list[Tensor]:
    """(positions, H) each: one for input masking, one for every layer for hidden masking."""
    if "placeholder" not in gate:
        return [gate[f"placeholder.{i}"][0] for i in range(layers)]
    placeholder = gate["placeholder"]
    return [placeholder[0]] if placeholder.dim() == 3 else [layer[0] for layer in placeholder]


def _one_vector(placeholder: Tensor) -> Tensor:
    if not torch.equal(placeholder, placeholder[:1].expand_as(placeholder)):
        raise ValueError(
            f"the placeholder has {len(placeholder)} vectors that differ, one for each position, and a probe has one"
        )
    return placeholder[0]


def _head(own: Mapping[str, Tensor], shift: str | None, inside: bool) -> dict[str, Tensor]:
    """The parameters of one gate network by the names of a `GateHead`, the old ones for weight norm."""
    g, v, bias = own["f.0.weight_g"], own["f.0.weight_v"], own["f.0.bias"]
    outer_g, outer_v = own["f.2.weight_g"], own["f.2.weight_v"]
    if shift is not None:
        offset = own[shift]
    else:
        offset = own["f.2.bias"] if "f.2.bias" in own else bias.new_zeros(())
    if inside:
        row = torch.cat([outer_g * outer_v / outer_v.norm(), own["f.2.bias"].view(1, 1)], dim=1)
        outer_g, outer_v = row.norm().view(1, 1), row
        g, v = torch.cat([g, g.new_zeros(1, 1)]), torch.cat([v, v.new_ones(1, v.shape[1])])
        bias = torch.cat([bias, bias.new_full((1,), _SATURATED)])
    return {
        "bias": offset.reshape(()),
        "inner.bias": bias,
        "inner.weight_g": g,
        "inner.weight_v": v,
        "outer.weight_g": outer_g,
        "outer.weight_v": outer_v,
    }
