from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from diffmask_fast.ops import backends, cpu, cuda, gate_mix, triton

FLOAT, DOUBLE = torch.float32, torch.float64


@pytest.fixture
def broken_cpu(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "the library is not there")
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


def test_every_backend_works_here_or_says_why_not():
    reasons = backends.available()
    assert reasons["reference"] is None and reasons["cpu"] is None
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in reasons["cuda"]
    if not torch.cuda.is_available() and not triton.interpreting():
        assert "finds no GPU" in reasons["triton"] or "not installed" in reasons["triton"]


def test_auto_takes_the_cpp_backend_for_what_it_can_run_and_the_reference_for_the_rest():
    assert backends.choose("auto", "cpu", FLOAT) == "cpu"
    assert backends.choose("auto", "cpu", DOUBLE) == "reference"
    assert backends.choose("auto", "meta", FLOAT) == "reference"


def test_the_environment_decides_for_auto_but_not_for_a_name(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose("auto", "cpu", FLOAT) == "reference"
    assert backends.choose("cpu", "cpu", FLOAT) == "cpu"


def test_an_unknown_name_in_the_environment_is_an_error_that_says_where_it_came_from(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="DIFFMASK_FAST_BACKEND='fast' is not a backend"):
        backends.choose("auto", "cpu", FLOAT)


@pytest.mark.parametrize(("device", "dtype", "reason"), [("cuda", FLOAT, "on cuda"), ("cpu", DOUBLE, "float64")])
def test_a_backend_asked_for_by_name_that_refuses_the_states_says_why(device, dtype, reason):
    with pytest.raises(RuntimeError, match=reason):
        backends.choose("cpu", device, dtype)


def test_a_backend_asked_for_by_name_that_is_not_there_says_why(broken_cpu):
    with pytest.raises(RuntimeError, match="the library is not there"):
        backends.choose("cpu", "cpu", FLOAT)


def test_auto_falls_back_to_the_reference_and_says_so_once(broken_cpu):
    with pytest.warns(RuntimeWarning, match="the library is not there") as warned:
        assert [backends.choose("auto", "cpu", FLOAT) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1


def test_auto_on_a_gpu_takes_cuda_then_triton_or_says_once_why_not(monkeypatch):
    backends._warn_once.cache_clear()
    monkeypatch.setattr(cuda, "unavailable", lambda: "no nvcc")
    monkeypatch.setattr(triton, "unavailable", lambda: "no driver")
    with pytest.warns(
        RuntimeWarning, match="slow reference .* 'cuda' can't run: no nvcc; 'triton' can't run: no driver"
    ):
        assert backends.choose("auto", "cuda", FLOAT) == "reference"
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    with pytest.warns(RuntimeWarning, match="gate_mix runs its triton backend, because 'cuda' can't run: no nvcc"):
        assert backends.choose("auto", "cuda", FLOAT) == "triton"
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert backends.choose("auto", "cuda", FLOAT) == "cuda"
    assert backends.choose("auto", "cuda", DOUBLE) == "reference"


def test_triton_takes_states_on_the_cpu_only_where_it_interprets(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="states on cuda, and these are on cpu; TRITON_INTERPRET=1"):
        backends.choose("triton", "cpu", FLOAT)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("triton", "cpu", FLOAT) == "triton"
    assert backends.choose("auto", "cpu", FLOAT) == "cpu"


def test_without_triton_or_a_gpu_the_reason_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "finds no GPU" in triton.unavailable.__wrapped__()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in triton.unavailable.__wrapped__()


def test_a_library_that_does_not_load_is_a_reason_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    (tmp_path / "_cpp.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "ops" / "cpu.py"))
    assert "could not be loaded" in cpu.unavailable.__wrapped__()
    (tmp_path / "_cpp.abi3.so").unlink()
    assert "without its C++ library" in cpu.unavailable.__wrapped__()


@pytest.mark.parametrize("backend", [cpu, cuda])
def test_an_old_torch_is_a_reason(monkeypatch, backend):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "2.10" in backend.unavailable.__wrapped__()


def test_a_cuda_library_that_is_not_there_or_does_not_load_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "ops" / "cuda.py"))
    assert "without its CUDA library" in cuda.unavailable.__wrapped__()
    (tmp_path / "_cuda.abi3.so").write_bytes(b"not a library")
    assert "could not be loaded" in cuda.unavailable.__wrapped__()


def test_importing_the_ops_brings_in_nothing_but_torch():
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import diffmask_fast, diffmask_fast.ops\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "new -= set(sys.stdlib_module_names)\n"
        "print(*sorted(new), 'torch._dynamo' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.split() in (["diffmask_fast", "False"], ["diffmask_fast", "torch", "False"])


def test_a_tensor_is_mixed_by_the_backend_in_the_graph(case):
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *inputs: gate_mix(*inputs).mixed)(*case())
    targets = [node for node in graph.graph.nodes if node.target is torch.ops.diffmask_fast.gate_mix.default]
    assert [node.args[-1] for node in targets] == ["cpu"]
