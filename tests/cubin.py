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
    """bytes of a block"""


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
    """For each kernel, by its (mangled) name."""
    found = {}
    text = _dump("-res-usage", cubin)
    for name, line in re.findall(r"Function ([^\s:]+):\s*\n\s*(.*)", text):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[name] = Resources(numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"])
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
        match = re.search(r"\b(LDG|STG)((?:\.\w+)*)", instruction)
        if match is not None:
            widths = [_WIDTHS[word] for word in match[2].split(".") if word in _WIDTHS]
            found.append(Access(match[1], widths[0] if widths else 32))
    return found


_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _dump(option: str, cubin: bytes) -> str:
    tool = cuobjdump()
    assert tool is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
