from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("transformers", "triton", "matplotlib", "rich", "safetensors", "typer", "accelerate", "tokenizers")


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "modules",
    [
        "diffmask_fast",
        "diffmask_fast.ops, diffmask_fast.distributions, diffmask_fast.sites, diffmask_fast.probes",
    ],
)
def test_an_import_brings_nothing_heavy_besides_torch(modules: str) -> None:
    code = f"import sys, torch; before = set(sys.modules); import {modules}; print(*(set(sys.modules) - before))"
    brought = set(fresh(code).split())
    assert "diffmask_fast" in brought
    assert not {name for name in brought if name.startswith(HEAVY)}


def test_an_import_takes_less_than_three_tenths_of_a_second_besides_torch() -> None:
    modules = "diffmask_fast, diffmask_fast.ops, diffmask_fast.distributions, diffmask_fast.sites, diffmask_fast.probes"
    code = f"import torch, time; start = time.process_time(); import {modules}; print(time.process_time() - start)"
    assert min(float(fresh(code)) for _ in range(2)) < 0.3


def test_every_public_name_can_be_imported() -> None:
    fresh("import diffmask_fast as d; [getattr(d, name) for name in d.__all__]; assert set(d.__all__) <= set(dir(d))")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import diffmask_fast

    with pytest.raises(AttributeError, match="module 'diffmask_fast' has no attribute 'nothing'"):
        _ = diffmask_fast.nothing
