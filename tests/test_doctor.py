from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmask_fast import doctor
from diffmask_fast.ops import backends

RUNNABLE = [
    (name, operation)
    for name, reason in backends.available().items()
    if reason is None
    for operation in backends.BACKENDS[name].modules
]


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.05)


@pytest.mark.parametrize(("backend", "operation"), RUNNABLE)
def test_every_backend_that_can_run_agrees_with_the_oracle(backend: str, operation: str) -> None:
    worst, cases = doctor.check(backend, operation, 0.05)
    assert cases >= 1 and 0 < worst <= 1


def test_the_report_names_every_backend_and_what_decides_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report()
    said = capsys.readouterr().out
    for name in (*backends.BACKENDS, "threads", "accelerator", "torch"):
        assert name in said
    for name, operation in RUNNABLE:
        assert f"{'backend ' + name:18} {operation:12} ok: " in said
    assert torch.__version__ in said


def test_a_backend_that_cannot_run_is_reported_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"reference": None, "cpu": "it was not built"})
    assert doctor.report()  # to lack a backend is no illness
    assert "backend cpu        not available: it was not built" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["gate_mix", "probe_logits"])
@pytest.mark.parametrize("fault", [1e-4, float("nan")])
def test_a_backend_that_is_wrong_makes_the_report_fail(
    fault: float, operation: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = backends.load
    sound = load("reference", operation)
    right = getattr(sound, f"{operation}_forward")

    def wrong(*args):
        first, *others = right(*args)
        return first + fault, *others

    broken = SimpleNamespace(**{**vars(sound), f"{operation}_forward": wrong})
    monkeypatch.setattr(
        backends, "load", lambda name, asked="gate_mix": broken if asked == operation else load(name, asked)
    )
    monkeypatch.setattr(backends, "available", lambda: {"reference": None})
    assert not doctor.report()
    said = capsys.readouterr().out
    assert f"backend reference  {operation:12} WRONG" in said
    assert said.count("WRONG") == 1 and said.count(" ok: ") == 1
