"""Compiles the GPU kernels, for GPUs that aren't there, as the backends launch them; `cubin` reads what comes out.

Triton has a compiler of its own; the CUDA sources take `nvcc`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import cubin

from diffmask_fast.ops import probe_triton
from diffmask_fast.ops import triton as backend

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of the states: Triton's names and PyTorch's
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
WIDTH = 1024


class Kernel(NamedTuple):
    name: str
    resources: cubin.Resources
    accesses: Counter[cubin.Access]
    ptx: str


def _compile(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[tuple[int, ...], Any],
    aligned: list[int],
    architecture: int,
    options: dict[str, Any],
) -> Kernel:
    """A Triton kernel whose arguments at the places `aligned` are whole multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    code = made.asm["cubin"]
    (resources,) = cubin.resources(code).values()
    (instructions,) = cubin.sass(code).values()
    # Triton asks for all of its shared memory at launch.
    resources = resources._replace(shared=resources.shared + made.metadata.shared)
    return Kernel(kernel.__name__, resources, Counter(cubin.global_accesses(instructions)), made.asm["ptx"])


# ---- gate_mix, Triton

GATE_MIX = ("forward_kernel", "backward_kernel", "finish_kernel")
POINTERS = {"seed": "*i64", "states": "*{}", "mixed": "*{}", "grad": "*{}", "grad_states": "*{}"}  # others are *fp32
NUMBERS = ("rows", "groups", "members", "parts", "part_size", "chunks", "count", "vectors", "columns", "row_programs")
LAW = ("temperature", "left", "spread", "shift")


def _places(dims: int) -> dict[str, tuple[Any, ...]]:
    """How rows are found: with one dim of each kind, as for a baseline of each position, or with two. 1 is constant."""
    steps, numbers = ("i32",) * (dims - 1) + (1,), ("i32",) * dims
    return {
        "steps": ("i32",) * (2 * dims - 1) + (1,),
        "states_at": ("i32",) * (2 * dims),
        "baseline_at": ("i32",) * (2 * dims),
        "group_steps": steps,
        "group_at": (numbers,) * 3,
        "member_steps": steps,
        "member_at": (numbers,) * 3,
    }


def gate_mix_tile(dtype: str, gates: int = 26, width: int = WIDTH) -> backend.Tile:
    """Of states with many rows."""
    return backend._tile(width, SIZES[dtype], gates, 10_000)


def gate_mix(
    name: str, architecture: int, dtype: str = "fp32", gates: int = 26, width: int = WIDTH, dims: int = 1
) -> Kernel:
    """The Triton kernel as it is for states of a dtype with all pointers aligned to 16 bytes."""
    from diffmask_fast.kernels import gate_mix as kernels

    kernel = getattr(kernels, name)
    bits, tile = backend._bits(gates), gate_mix_tile(dtype, gates, width)
    constants = {"R": tile.rows, "C": tile.columns, "BITS": bits, "V": 16 // SIZES[dtype]}
    if name == "finish_kernel":
        constants = {"R": backend.GATES_OF_A_TILE >> bits, "C": 128, "PARTS": 32, "BITS": bits}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], int] = {}
    aligned = []

    def types(entry: Any, path: tuple[int, ...]) -> Any:
        if isinstance(entry, tuple):
            return tuple(types(part, (*path, i)) for i, part in enumerate(entry))
        if isinstance(entry, int):
            constexprs[path] = entry
            return "constexpr"
        return entry

    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            entry: Any = constants[argument]
        elif argument in _places(dims):
            entry = _places(dims)[argument]
        elif argument in LAW:
            entry = "fp32"
        elif argument in NUMBERS:
            entry = "i32"
        else:
            entry = POINTERS.get(argument, "*fp32").format(dtype)
            aligned.append(i)
        signature[argument] = types(entry, (i,))
    warps = 4 if name == "finish_kernel" else tile.warps
    return _compile(kernel, signature, constexprs, aligned, architecture, {"num_warps": warps, **backend.OPTIONS})


# ---- probe_logits, Triton

_FORWARD = (
    "table:*i64 scale:*fp32 first:STATE first_stride:i32 first_size:i32 logits:*fp32 raw:*fp32 hidden:*fp32 "
    "count:i32 width:i32 sites:i32 bound:fp32"
)
_BACKWARD = (
    "table:*i64 first:STATE first_stride:i32 first_size:i32 grad:*fp32 raw:*fp32 hidden:*fp32 outer_products:*fp32 "
    "count:i32 width:i32 sites:i32 bound:fp32"
)


class Probe(NamedTuple):
    name: str
    arguments: str
    blocks: str
    warps: int


PROBE_LOGITS = (
    Probe("probe_norms", "table:*i64 scale:*fp32 first_size:i32 width:i32", "NORM_BLOCKS", probe_triton.NORM_WARPS),
    Probe("probe_forward", _FORWARD, "FORWARD_BLOCKS", probe_triton.WARPS),
    Probe("probe_forward", _FORWARD, "FEW_ROWS_BLOCKS", probe_triton.WARPS),
    Probe("probe_backward", _BACKWARD, "BACKWARD_BLOCKS", probe_triton.WARPS),
    Probe(
        "probe_norms_backward",
        "table:*i64 outer_products:*fp32 first_size:i32 width:i32",
        "NORM_BACKWARD_BLOCKS",
        probe_triton.NORM_WARPS,
    ),
)


def probe_logits(probe: Probe, architecture: int, dtype: str) -> Kernel:
    """The Triton kernel as it is for heads 256 wide inside, a first state, a bound, and all that is aligned."""
    import triton.language as tl
    from diffmask_fast.kernels import probe_logits as kernels

    kernel = getattr(kernels, probe.name)
    types = dict(pair.split(":") for pair in probe.arguments.replace("STATE", f"*{dtype}").split())
    constants = {
        "FIRST": True, "SAVE": True, "BOUND": True, "STATE": getattr(tl, DTYPES[dtype]), "ALIGN": probe_triton.ALIGN,
        "INNER": 256, "PRECISION": probe_triton.PRECISION, **getattr(probe_triton, probe.blocks),
    }  # fmt: skip
    names = kernel.arg_names
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    constexprs = {(names.index(key),): value for key, value in constants.items() if key in names}
    aligned = [i for i, argument in enumerate(names) if signature[argument][0] == "*" or argument in ("count", "width")]
    return _compile(kernel, signature, constexprs, aligned, architecture, {"num_warps": probe.warps})


# ---- gate_mix, CUDA

# those of setup.py that bear on the code
FLAGS = ("-std=c++20", "-O3", "-fmad=false")


def nvcc(*arguments: str) -> None:
    assert NVCC is not None
    result = subprocess.run([NVCC, *FLAGS, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def cuda(architecture: int, folder: Path) -> bytes:
    """The cubin of all CUDA kernels, by way of a file in a folder."""
    path = folder / f"gate_mix-{architecture}.cubin"
    nvcc(f"-arch=sm_{architecture}", "-cubin", str(ROOT / "csrc/gate_mix_cuda.cu"), "-o", str(path))
    return path.read_bytes()


class Instantiation(NamedTuple):
    name: str
    dtype: str | None
    """as in `diffmask::Float32`; None where states are not read"""
    wide: bool
    """for rows that are aligned to 16 bytes"""


def instantiation(mangled: str) -> Instantiation:
    match = re.search(r"(mix_forward|mix_backward|finish_backward)(?:INS0_6AccessINS_\d+(\w+?)ELb(\d)E)?", mangled)
    assert match is not None, mangled
    return Instantiation(match[1], match[2], match[3] == "1")
