"""The scalar math of csrc, compiled alone, against NumPy in float64 and PyTorch's own conversions."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
# those of setup.py that bear on the bits
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / f"gate_math{''.join(flags)}.so"
    sources = [str(ROOT / "tests/ops/gate_math.cpp"), str(ROOT / "csrc/gate_mix_cpu.cpp")]
    command = [COMPILER, *FLAGS, "-DGATE_NO_CLONES", *flags, "-fPIC", "-shared", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("gate_math"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def apply(function, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    function(ctypes.c_int64(x.size), pointer(x), pointer(out))
    return out


def ulps(ours: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, in units in the last place of float32 at the exact value."""
    return float((np.abs(ours.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


def test_exp_is_within_one_ulp(library):
    x = -np.concatenate([np.linspace(0, 87, 2_000_001), np.geomspace(1e-30, 1, 200_001)]).astype(np.float32)
    assert ulps(apply(library.exp_of_negative_all, x), np.exp(x.astype(np.float64))) <= 1


def test_exp_is_zero_where_the_result_would_be_subnormal(library):
    x = -np.array([88, 1e3, 1e30, 3e38, np.inf], dtype=np.float32)
    assert (apply(library.exp_of_negative_all, x) == 0).all()


def test_log_of_every_ratio_that_the_noise_takes_is_within_one_ulp(library):
    odd = np.arange(2**23, dtype=np.int64) * 2 + 1
    x = odd.astype(np.float32) / (2**24 - odd).astype(np.float32)
    assert ulps(apply(library.log_of_positive_all, x), np.log(x.astype(np.float64))) <= 1


def test_log1p_is_within_two_ulps(library):
    grid = np.concatenate([np.linspace(0, 1, 2_000_001)[1:], np.geomspace(1e-37, 1, 200_001)])
    x = np.minimum(grid.astype(np.float32), np.float32(1))
    assert ulps(apply(library.log1p_of_unit_all, x), np.log1p(x.astype(np.float64))) <= 2


def test_tanh_is_within_three_ulps_and_odd(library):
    x = np.concatenate([np.linspace(0, 25, 2_000_001), np.geomspace(1e-37, 1, 200_001), [1e30, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    out = apply(library.tanh_of_all, x)
    assert ulps(out, np.tanh(x.astype(np.float64))) <= 3
    np.testing.assert_array_equal(np.signbit(out), np.signbit(x))
    assert np.isnan(apply(library.tanh_of_all, np.array([np.nan], dtype=np.float32))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_loaded_exactly(library, dtype):
    x = np.arange(2**16, dtype=np.uint16)
    out = np.empty(x.size, dtype=np.float32)
    library.load_all(ctypes.c_int64(dtype == torch.bfloat16), pointer(x), pointer(out), ctypes.c_int64(x.size))
    expected = torch.from_numpy(x.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storing_rounds_to_nearest_even_as_pytorch_does(library, dtype):
    # Every bit pattern of the upper half of a float32, with lower halves around each way of rounding.
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    x = np.ascontiguousarray((upper | lower).reshape(-1)).view(np.float32)
    out = np.empty(x.size, dtype=np.uint16)
    library.store_all(ctypes.c_int64(dtype == torch.bfloat16), pointer(x), pointer(out), ctypes.c_int64(x.size))
    expected = torch.from_numpy(x).to(dtype)
    ours = torch.from_numpy(out.view(np.int16)).view(dtype)
    assert torch.equal(ours.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(ours.view(torch.int16)[number], expected.view(torch.int16)[number])


def features() -> str:
    """The CPU's instruction sets, as Linux lists them."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares instruction sets of x86-64")
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    rows, count, width = 60, 7, 83
    generator = np.random.default_rng(0)
    logits = generator.normal(1, 2, (rows, count)).astype(np.float32)
    states = torch.from_numpy(generator.normal(0, 1, (rows, width)).astype(np.float32))
    baseline = generator.normal(0, 1, width).astype(np.float32)
    levels = [level for level, feature in LEVELS.items() if feature == "sse2" or feature in features()]
    if len(levels) == 1:
        pytest.skip("this CPU has one instruction set: nothing to compare")
    results: dict[str, list[bytes]] = {level: [] for level in levels}
    for level in levels:
        built = compiled(tmp_path, f"-march={level}")
        for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            storage = states.to(dtype).view(torch.int16).numpy()
            out = np.zeros(5 * rows * count + 2 * rows + width + 2 * rows * width, dtype=np.float32)
            sizes = [ctypes.c_int64(n) for n in (rows, count, width, index)]
            built.kernels(*sizes, *map(pointer, (logits, storage, baseline, out)))
            results[level].append(out.tobytes())
    assert all(result == results["x86-64"] for result in results.values())
