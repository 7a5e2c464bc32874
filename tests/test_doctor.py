from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmask_fast import doctor
from diffmask_fast.ops import backends, reference

RUNNABLE = [name for name, reason in backends.available().items() if reason is None]


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_SECONDS", 0.05)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_every_backend_that_can_run_agrees_with_the_oracle(backend: str) -> None:
    worst, cases = doctor.check(backend)
    assert cases >= 1 and 0 < worst <= 1


def test_the_report_names_every_backend_and_what_decides_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.report()
    said = capsys.readouterr().out
    for name in (*backends.BACKENDS, "threads", "accelerator", "torch"):
        assert name in said
    assert f"backend {RUNNABLE[0]}" in said and torch.__version__ in said


def test_a_backend_that_cannot_run_is_reported_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"reference": None, "cpu": "it was not built"})
    assert doctor.report()  # to lack a backend is no illness
    assert "backend cpu        not available: it was not built" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [1e-4, float("nan")])
def test_a_backend_that_is_wrong_makes_the_report_fail(
    fault: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args):
        mixed, gates, log_open = reference.gate_mix_forward(*args)
        return mixed, gates + fault, log_open

    load = backends.load
    broken = SimpleNamespace(gate_mix_forward=wrong, unavailable=lambda: None)
    monkeypatch.setattr(
        backends, "load", lambda name, *operation: broken if name == "reference" else load(name, *operation)
    )
    monkeypatch.setattr(backends, "available", lambda: {"reference": None})
    assert not doctor.report()
    assert "backend reference  WRONG" in capsys.readouterr().out
