"""Reads back what a compiled GPU kernel takes, and how wide its accesses of global memory are, without a GPU.

Needs `cuobjdump`, which Triton brings along.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Resources(NamedTuple):
    registers: int
    """of a thread"""
    stack: int
    local: int
    """bytes of a thread: neither spills nor arrays lie there if both are 0"""
    shared: int
    """bytes of a block, without those that the system keeps of each"""
    threads: int
    """of a block, which the kernel was compiled for"""


class Access(NamedTuple):
    op: str
    """LDG or STG"""
    bits: int


def cuobjdump() -> str | None:
    """Triton's, or else the one on the path."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump")


def resources(cubin: bytes) -> dict[str, Resources]:
    """For each kernel, by its (mangled) name; what is asked for at launch is not among its shared memory."""
    found = {}
    elf, text = _dump("-elf", cubin), _dump("-res-usage", cubin)
    threads = _threads(elf)
    version = re.search(r"\bsm=(\d+)", elf)
    assert version is not None
    for name, line in re.findall(r"Function ([^\s:]+):\s*\n\s*(.*)", text):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        shared = numbers["SHARED"]
        if int(version[1]) >= 90 and shared > 0:  # then, and only then, the system's KiB is counted in
            shared -= 1024
        found[name] = Resources(numbers["REG"], numbers["STACK"], numbers["LOCAL"], shared, threads[name])
    return found


def sass(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel, in order, without addresses and encodings."""
    found: dict[str, list[str]] = {}
    for part in _dump("-sass", cubin).split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]+?)\s*;", part)
    return found


def global_accesses(instructions: list[str]) -> list[Access]:
    """Loads from and stores to global memory, in order."""
    found = []
    for instruction in instructions:
        # LDGSTS loads too, to shared memory.
        match = re.search(r"\b(LDG|STG)(?:STS)?((?:\.\w+)*)", instruction)
        if match is not None:
            widths = [_WIDTHS[word] for word in match[2].split(".") if word in _WIDTHS]
            found.append(Access(match[1], widths[0] if widths else 32))
    return found


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _threads(elf: str) -> dict[str, int]:
    """Of a block of each kernel: what __launch_bounds__ or Triton's number of warps says."""
    found = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        match = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s*(\w+)", part)
        if match is not None:
            found[part.split(None, 1)[0]] = int(match[1], 16)
    return found


def _dump(option: str, cubin: bytes) -> str:
    tool = cuobjdump()
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
