"""Builds the C++ and CUDA libraries, where that can be done; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
LIMITED_API = "cp310"
CPP, CUDA = "diffmask_fast._cpp", "diffmask_fast._cuda"
CPP_SOURCES = ["csrc/library.cpp", "csrc/gate_mix_cpu.cpp", "csrc/probe_library.cpp", "csrc/probe_cpu.cpp"]
CPP_HEADERS = ["csrc/clones.h", "csrc/gate_math.h", "csrc/gate_mix_cpu.h", "csrc/half_types.h", "csrc/probe_cpu.h"]
CPP_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Together these let GCC vectorise the gate's math; without contraction every instruction set gives the
    # same bits.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
CUDA_SOURCES = ["csrc/library_cuda.cpp", "csrc/gate_mix_cuda.cu"]
CUDA_HEADERS = ["csrc/gate_math.h", "csrc/gate_mix_cuda.h", "csrc/gate_mix_cuda.cuh", "csrc/half_types.h"]
# Without fused multiply-adds a GPU gives the same bits too.
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", "-cudart=shared"]
# Code for these GPUs and, for newer ones, what their driver can compile. 10.0 is left out where nvcc is too old for it.
ARCHITECTURES = "8.0 9.0 10.0+PTX"
DEFINES = [
    ("TORCH_TARGET_VERSION", f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"),
    ("Py_LIMITED_API", "0x030A0000"),
]


def reach_torch() -> Any:
    """The torch of the environment that is installed into; RuntimeError says why that can't be."""
    # pip's build isolation hides it, and the build has to be against that one and no other.
    for name in ("purelib", "platlib"):
        path = sysconfig.get_path(name)
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"no torch to build against ({error}); install torch, then --no-build-isolation") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise RuntimeError(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return torch


def configure(extension: Extension) -> None:
    """Add what depends on the machine; RuntimeError says what is missing there."""
    if os.name != "posix":
        raise RuntimeError("it is written for the compilers of Linux and macOS")
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler} is not there)")
    reach_torch()
    from torch.utils.cpp_extension import include_paths, library_paths

    extension.include_dirs = include_paths()
    extension.library_dirs = library_paths()


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        path = Path(os.environ.get(variable, ""), "bin", "nvcc")
        if os.environ.get(variable) and path.exists():
            return str(path)
    return shutil.which("nvcc")


def check_cuda(nvcc: str | None) -> str:
    """The nvcc that can build for this torch; RuntimeError says why none can."""
    asked = os.environ.get("DIFFMASK_FAST_CUDA")
    if asked == "0":
        raise RuntimeError("DIFFMASK_FAST_CUDA=0")
    if nvcc is None:
        raise RuntimeError("no nvcc (set CUDA_HOME, or put it on PATH)")
    theirs = reach_torch().version.cuda
    if asked == "1":
        return nvcc
    if theirs is None:
        raise RuntimeError("torch is a build without CUDA (DIFFMASK_FAST_CUDA=1 builds it nevertheless)")
    ours = nvcc_version(nvcc)
    if ours[0] != int(theirs.split(".")[0]):
        raise RuntimeError(f"nvcc is {ours[0]}.{ours[1]}, torch was built with CUDA {theirs}: the first numbers differ")
    return nvcc


def nvcc_version(nvcc: str) -> tuple[int, int]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", said)
    if match is None:
        raise RuntimeError(f"{nvcc} does not say what version it is")
    return int(match[1]), int(match[2])


def architecture_flags(asked: str | None, version: tuple[int, int]) -> list[str]:
    """For nvcc, from a list as in TORCH_CUDA_ARCH_LIST: "8.0 9.0+PTX", with blanks or semicolons."""
    if not asked:
        asked = ARCHITECTURES if version >= (12, 8) else "8.0 9.0+PTX"
    flags = []
    for name in re.split(r"[\s;]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST names {name!r}, expected numbers like 9.0 or 9.0+PTX")
        number = match[1] + match[2]
        codes = f"sm_{number},compute_{number}" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return flags


class Build(build_ext):
    """Leaves out a library that can't be built, and says so, rather than fail: the reference backend needs none."""

    def build_extensions(self) -> None:
        built, said = [], []
        for extension in self.extensions:
            name = "CUDA" if extension.name == CUDA else "C++"
            try:
                configure(extension)
                self.build_extension(extension)
                built.append(extension)
                said.append(f"built with the {name} library")
            except Exception as error:
                self.remove_stale(extension)
                said.append(f"built without the {name} library: {str(error).strip() or type(error).__name__}")
        self.extensions = built
        print(f"diffmask_fast: {'; '.join(said)}", file=sys.stderr, flush=True)

    def build_extension(self, extension: Extension) -> None:
        if extension.name != CUDA:
            return super().build_extension(extension)
        nvcc = check_cuda(find_nvcc())
        path = Path(self.get_ext_fullpath(extension.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["torch_cpu"]
        # A torch without CUDA has none; what is built against one finds its symbols only where it is loaded already.
        if any(Path(folder, "libtorch_cuda.so").exists() for folder in extension.library_dirs):
            libraries.append("torch_cuda")
        self.spawn(
            [
                nvcc,
                *CUDA_FLAGS,
                *architecture_flags(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc_version(nvcc)),
                *(f"-D{name}={value}" for name, value in extension.define_macros),
                *(f"-isystem={folder}" for folder in extension.include_dirs),
                *extension.sources,
                *("-o", str(path)),
                *(f"-L{folder}" for folder in extension.library_dirs),
                *(f"-l{library}" for library in libraries),
            ]
        )

    def remove_stale(self, extension: Extension) -> None:
        """In a source tree an older library must not pass for the one that could not be built."""
        if self.inplace or self.editable_mode:
            for path in Path(__file__).parent.glob(f"{extension.name.replace('.', '/')}*.so"):
                path.unlink()


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                CPP,
                CPP_SOURCES,
                depends=CPP_HEADERS,
                libraries=["torch_cpu"],
                define_macros=DEFINES,
                extra_compile_args=CPP_FLAGS,
                language="c++",
                py_limited_api=True,
            ),
            Extension(
                CUDA,
                CUDA_SOURCES,
                depends=CUDA_HEADERS,
                define_macros=[*DEFINES, ("USE_CUDA", "1")],
                language="c++",
                py_limited_api=True,
            ),
        ],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": LIMITED_API}},
    )
