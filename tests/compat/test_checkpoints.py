"""Published checkpoints: nothing in them is run, and their gates come out as gates and as probes that say the same."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmask_fast.compat.checkpoints import convert, gate_state, probe_of, read, rename_weight_norm
from diffmask_fast.compat.diffmask import (
    DiffMaskGateHidden,
    DiffMaskGateInput,
    MLPGate,
    MLPMaxGate,
    PerSampleDiffMaskGate,
)
from diffmask_fast.masking import keep_probabilities
from diffmask_fast.probes import load_probe

H, A, L = 6, 4, 3


def trained(cls: Any = DiffMaskGateInput, **settings: Any) -> Any:
    torch.manual_seed(0)
    gate = cls(H, A, L, **({"max_position_embeddings": 1, "placeholder": True} | settings))
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return gate


def checkpoint_of(gate: nn.Module, **more: Any) -> dict[str, Any]:
    """As Lightning writes it: the model and its gate, multipliers, statistics, arguments."""
    state = {f"gate.{name}": value for name, value in gate.state_dict().items()}
    state |= {f"alpha.{i}": torch.tensor([float(i)]) for i in range(L)}
    state |= {"net.bert.pooler.dense.bias": torch.zeros(3), "running_acc": torch.ones(L)}
    return {
        "state_dict": state,
        "epoch": 4,
        "global_step": 1234,
        "optimizer_states": [],
        "hparams": argparse.Namespace(gate="input", eps=0.1),
        **more,
    }


def states_of(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 5, H, generator=generator) for _ in range(L)]


GATES = [
    (DiffMaskGateInput, {"gate_fn": MLPMaxGate, "gate_bias": False}),
    (DiffMaskGateInput, {"gate_fn": MLPMaxGate, "gate_bias": True}),
    (DiffMaskGateInput, {"placeholder": False, "gate_bias": False}),
    (DiffMaskGateHidden, {"gate_fn": MLPMaxGate, "gate_bias": True}),
    (DiffMaskGateHidden, {"gate_fn": MLPGate, "gate_bias": True}),
    (DiffMaskGateHidden, {"gate_fn": MLPGate, "gate_bias": False, "placeholder": False}),
]


@pytest.mark.parametrize(("cls", "settings"), GATES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_converted_probe_keeps_what_the_gate_keeps(cls: Any, settings: Any, zipped: bool, tmp_path: Path) -> None:
    gate = trained(cls, **settings)
    torch.save(checkpoint_of(gate), tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "a.ckpt", tmp_path / "probe.safetensors")
    probe = load_probe(tmp_path / "probe.safetensors")
    want = gate(states_of(), None, None)[4].exp()
    got = keep_probabilities(probe, dict(enumerate(states_of())))
    # Rounding in float32 of logits up to 15.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for k in range(L):
        placeholder = gate.placeholder if cls is DiffMaskGateInput else gate.placeholder[k]
        assert torch.equal(probe.baseline(k), placeholder[0, 0])
    assert probe.meta == {
        "converted_from": "a.ckpt", "multipliers": [0.0, 1.0, 2.0], "epoch": 4, "global_step": 1234
    }  # fmt: skip


def test_a_gate_of_ours_loads_the_gate_s_part(tmp_path: Path) -> None:
    gate = trained()
    torch.save(checkpoint_of(gate), tmp_path / "a.ckpt")
    torch.manual_seed(1)
    other = DiffMaskGateInput(H, A, L, 1, placeholder=True)
    other.load_state_dict(gate_state(read(tmp_path / "a.ckpt")))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), gate.parameters(), strict=True))


def test_names_of_the_new_weight_norm_are_understood_and_can_be_made() -> None:
    old = checkpoint_of(trained())["state_dict"]
    new = rename_weight_norm(old, new=True)
    assert "gate.g_hat.0.f.0.parametrizations.weight.original0" in new and not any("weight_g" in name for name in new)
    assert rename_weight_norm(new, new=False).keys() == old.keys()
    assert gate_state({"state_dict": new}).keys() == gate_state(old).keys()


def test_what_a_gate_saved_by_itself_is_taken_too() -> None:
    state = trained().state_dict()
    assert gate_state(state).keys() == state.keys()


def test_the_bound_is_that_of_the_hyperparameters_or_of_the_caller(tmp_path: Path) -> None:
    gate = trained(gate_fn=lambda *sizes, bias: MLPMaxGate(*sizes, 15, bias))
    torch.save(checkpoint_of(gate, hyper_parameters={"mul_activation": 15.0}), tmp_path / "a.ckpt")
    assert convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors").bound == 15.0
    assert convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors", 12).bound == 12.0
    probe = load_probe(tmp_path / "a.safetensors")
    assert probe.bound == 12.0


def touch(path: str) -> None:
    Path(path).touch()


class Dangerous:
    def __init__(self, call: Any, path: Path) -> None:
        self.call, self.path = call, path

    def __reduce__(self) -> Any:
        return self.call, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [touch, os.mkdir])
def test_nothing_in_a_checkpoint_is_run(call: Any, zipped: bool, tmp_path: Path) -> None:
    content = checkpoint_of(trained(), callbacks=Dangerous(call, tmp_path / "made"))
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    if zipped and call is touch:  # an unknown name: an empty shell takes its place
        assert gate_state(read(tmp_path / "a.ckpt"))
    else:
        with pytest.raises(ValueError, match="can be read without running code"):
            read(tmp_path / "a.ckpt")
    assert not (tmp_path / "made").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read(tmp_path / "text.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        read(tmp_path / "list.ckpt")
    whole = tmp_path / "whole.ckpt"
    torch.save(checkpoint_of(trained()), whole)
    (tmp_path / "half.ckpt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="not a checkpoint"):
        read(tmp_path / "half.ckpt")


def test_a_gate_that_is_no_probe_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="there is no gate"):
        gate_state({"state_dict": {"net.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="per-sample"):
        probe_of(PerSampleDiffMaskGate(H, L, 5).state_dict())
    with pytest.raises(ValueError, match="unbounded"):
        probe_of(trained(gate_fn=MLPGate).state_dict())
    with pytest.raises(ValueError, match="4 vectors that differ"):
        probe_of(trained(max_position_embeddings=4).state_dict())
    state = trained().state_dict()
    del state["g_hat.1.f.0.weight_g"]
    with pytest.raises(ValueError, match="not those of a published gate"):
        probe_of(state)


def test_the_command_converts(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from diffmask_fast.cli import app

    torch.save(checkpoint_of(trained()), tmp_path / "a.ckpt")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "p.safetensors")])
    assert done.exit_code == 0 and "input masking, 3 sites, states 6 wide" in " ".join(done.output.split())
    assert load_probe(tmp_path / "p.safetensors").masking == "input"
