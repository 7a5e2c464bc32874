from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup_script() -> types.ModuleType:
    """setup.py, without what it does when it is run."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_compilers_the_build_succeeds_and_says_what_was_left_out(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = next(line for line in result.stderr.splitlines() if line.startswith("diffmask_fast: "))
    assert "built without the C++ library: no C++ compiler" in said
    assert "built without the CUDA library: no C++ compiler" in said
    assert not list(tmp_path.rglob("*.so"))


def test_the_cuda_library_is_for_a_torch_with_cuda_and_an_nvcc_of_its_kind(setup_script, monkeypatch):
    monkeypatch.delenv("DIFFMASK_FAST_CUDA", raising=False)
    monkeypatch.setattr(setup_script, "nvcc_version", lambda nvcc: (13, 0))
    for version, reason in ((None, "without CUDA"), ("12.8", "nvcc is 13.0, torch was built with CUDA 12.8")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(RuntimeError, match=reason):
            setup_script.check_cuda("nvcc")
    with pytest.raises(RuntimeError, match="no nvcc"):
        setup_script.check_cuda(None)
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    assert setup_script.check_cuda("nvcc") == "nvcc"


def test_the_environment_forces_or_skips_the_cuda_library(setup_script, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("DIFFMASK_FAST_CUDA", "1")
    assert setup_script.check_cuda("nvcc") == "nvcc"
    monkeypatch.setenv("DIFFMASK_FAST_CUDA", "0")
    with pytest.raises(RuntimeError, match="DIFFMASK_FAST_CUDA=0"):
        setup_script.check_cuda("nvcc")


@pytest.mark.parametrize(
    ("asked", "version", "expected"),
    [
        (None, (13, 0), ["80,code=[sm_80]", "90,code=[sm_90]", "100,code=[sm_100,compute_100]"]),
        (None, (12, 4), ["80,code=[sm_80]", "90,code=[sm_90,compute_90]"]),
        ("8.6;9.0a+PTX", (13, 0), ["86,code=[sm_86]", "90a,code=[sm_90a,compute_90a]"]),
        ("12.0 8.9 ", (13, 0), ["120,code=[sm_120]", "89,code=[sm_89]"]),
    ],
)
def test_architectures_are_those_asked_for_or_the_usual_ones(setup_script, asked, version, expected):
    assert setup_script.architecture_flags(asked, version) == [f"-gencode=arch=compute_{rest}" for rest in expected]


def test_an_architecture_that_is_no_number_is_an_error_that_names_it(setup_script):
    with pytest.raises(RuntimeError, match="'Hopper'"):
        setup_script.architecture_flags("Hopper", (13, 0))
