"""Builds the C++ library, where that can be done; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
LIMITED_API = "cp310"
SOURCES = ["csrc/library.cpp", "csrc/gate_mix_cpu.cpp", "csrc/probe_library.cpp", "csrc/probe_cpu.cpp"]
HEADERS = ["csrc/clones.h", "csrc/gate_math.h", "csrc/gate_mix_cpu.h", "csrc/half_types.h", "csrc/probe_cpu.h"]
FLAGS = [
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
DEFINES = [
    ("TORCH_TARGET_VERSION", f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"),
    ("Py_LIMITED_API", "0x030A0000"),
]


def report(line: str) -> None:
    print(f"diffmask_fast: {line}", file=sys.stderr, flush=True)


def reach_torch() -> None:
    """Import the torch of the environment that is installed into; RuntimeError says why that can't be."""
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


class Build(build_ext):
    """Leaves the library out, and says so, rather than fail: the reference backend needs none."""

    def run(self) -> None:
        try:
            for extension in self.extensions:
                configure(extension)
            super().run()
            report("built with the C++ library")
        except Exception as error:
            self.extensions = []
            self.remove_stale()
            report(f"built without the C++ library: {str(error).strip() or type(error).__name__}")

    def remove_stale(self) -> None:
        """In a source tree an older library must not pass for the one that could not be built."""
        if self.inplace or self.editable_mode:
            for path in Path(__file__).parent.glob("diffmask_fast/_cpp*.so"):
                path.unlink()


setup(
    ext_modules=[
        Extension(
            "diffmask_fast._cpp",
            SOURCES,
            depends=HEADERS,
            libraries=["torch_cpu"],
            define_macros=DEFINES,
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": LIMITED_API}},
)
