"""The C++ backend and the CUDA kernels, run on the host, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def runtimes() -> str | None:
    """What has to be loaded before Python for a library that is sanitized, or None where it isn't there."""
    if COMPILER is None or sys.platform != "linux":
        return None
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        command = [COMPILER, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtimes() is None, reason="there is no g++ with sanitizers"),
]

# The C++ library is looked for beside the package: here is another one.
RUN = """
import sys, pytest
from diffmask_fast.ops import cpu
cpu.__file__ = sys.argv[1]
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def compile_library(library: Path, *arguments: str) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    assert COMPILER is not None
    command = [
        *(COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", *SANITIZE),
        *(f"-isystem{path}" for path in include_paths()),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *arguments,
        *("-o", str(library), *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    # The clones for other instruction sets are chosen before the sanitizer is ready.
    compile_library(folder / "_cpp.so", "-DGATE_NO_CLONES", "csrc/library.cpp", "csrc/gate_mix_cpu.cpp")
    return folder


def run_tests(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    preload = runtimes()
    assert preload is not None
    # Python does not free everything at exit.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "ops/cpu.py"), *arguments],
        env=os.environ | {"LD_PRELOAD": preload, "OMP_NUM_THREADS": "2"} | options | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def assert_clean(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert "AddressSanitizer:" not in result.stderr and "runtime error" not in result.stderr, result.stderr


def test_the_cpp_backend_keeps_to_its_memory_and_to_the_language(cpp):
    result = run_tests(cpp, "tests/ops/test_gate_mix.py", "tests/ops/test_door.py")
    assert_clean(result)


def test_the_cuda_kernels_keep_to_their_memory_and_to_the_language(cpp):
    library = cpp / "cuda_host.so"
    compile_library(
        library,
        *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Itests/cuda_host"),
        *("-x", "c++", "csrc/gate_mix_cuda.cu", "tests/cuda_host/library.cpp"),
    )
    assert_clean(run_tests(cpp, "tests/ops/test_cuda_host.py", CUDA_HOST_LIBRARY=str(library)))


def test_the_sanitizer_sees_a_kernel_that_reads_past_the_end(cpp):
    """Else the tests above could not fail."""
    source = (ROOT / "csrc/gate_mix_cpu.cpp").read_text()
    wrong = source.replace("i < width; ++i) out[i] =", "i <= width; ++i) out[i] =")
    assert wrong != source
    folder = cpp / "wrong"
    folder.mkdir()
    (folder / "gate_mix_cpu.cpp").write_text(wrong)
    compile_library(
        folder / "_cpp.so", "-DGATE_NO_CLONES", "-Icsrc", "csrc/library.cpp", str(folder / "gate_mix_cpu.cpp")
    )
    result = run_tests(folder, "tests/ops/test_gate_mix.py", "-x", "-k", "closed_gate and cpu")
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr + result.stdout
