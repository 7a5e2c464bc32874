"""The Triton kernels compile, for GPUs that aren't there, to code that spills nothing and moves 128 bits at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import cubin
import interpreter
import pytest

from diffmask_fast.ops import triton as backend

triton = pytest.importorskip("triton")
if interpreter.ON:
    pytest.skip("TRITON_INTERPRET=1 is in the environment: nothing is compiled", allow_module_level=True)
if cubin.cuobjdump() is None:
    pytest.skip("there is no cuobjdump", allow_module_level=True)

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of the states, and their bytes
WIDTH = 1024
THREADS = 128
# Of a thread. A multiprocessor has room for five blocks of forward and finish, for three of backward, which has the
# next rows of two tensors on their way while it works on these.
MOST_REGISTERS = {"forward_kernel": 96, "backward_kernel": 168, "finish_kernel": 96}

POINTERS = {"seed": "*i64", "states": "*{}", "mixed": "*{}", "grad": "*{}", "grad_states": "*{}"}  # others are *fp32
NUMBERS = ("rows", "groups", "members", "parts", "part_size", "chunks", "count", "vectors", "columns", "row_programs")
LAW = ("temperature", "left", "spread", "shift")


def places(dims: int) -> dict[str, tuple[Any, ...]]:
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


class Compiled(NamedTuple):
    name: str
    resources: cubin.Resources
    accesses: Counter[cubin.Access]
    ptx: str


def compiled(
    name: str, architecture: int, dtype: str = "fp32", gates: int = 26, width: int = WIDTH, dims: int = 1
) -> Compiled:
    """The kernel as it is for states of a dtype with all pointers aligned to 16 bytes."""
    from diffmask_fast.kernels import gate_mix as kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    size, bits = DTYPES[dtype], backend._bits(gates)
    tile = backend._tile(width, size, gates, 10_000)
    constants = {"R": tile.rows, "C": tile.columns, "BITS": bits, "V": 16 // size}
    if name == "finish_kernel":
        constants = {"R": backend.GATES_OF_A_TILE >> bits, "C": 128, "PARTS": 32, "BITS": bits}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], int] = {}
    attributes = {}

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
        elif argument in places(dims):
            entry = places(dims)[argument]
        elif argument in LAW:
            entry = "fp32"
        elif argument in NUMBERS:
            entry = "i32"
        else:
            entry = POINTERS.get(argument, "*fp32").format(dtype)
            attributes[(i,)] = [["tt.divisibility", 16]]
        signature[argument] = types(entry, (i,))
    warps = 4 if name == "finish_kernel" else tile.warps
    options = {"num_warps": warps, **backend.OPTIONS}
    source = ASTSource(kernel, signature, constexprs, attributes)
    code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm
    (resources,) = cubin.resources(code["cubin"]).values()
    (instructions,) = cubin.sass(code["cubin"]).values()
    return Compiled(name, resources, Counter(cubin.global_accesses(instructions)), code["ptx"])


def assert_lean(kernel: Compiled) -> None:
    assert kernel.resources.local == kernel.resources.stack == 0
    assert kernel.resources.registers <= MOST_REGISTERS[kernel.name]
    # A fused multiply-add or a rough division would give a gate other bits than on the CPU.
    assert "fma." not in kernel.ptx and "div.full" not in kernel.ptx and ".ftz" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx


def vectors(size: int, dtype: str) -> int:
    """How many 128-bit accesses a thread makes for a tile whose elements have `size` bytes."""
    tile = backend._tile(WIDTH, DTYPES[dtype], 26, 10_000)
    assert tile.warps * 32 == THREADS
    return tile.rows * tile.columns * size // 16 // THREADS


def narrow(kernel: Compiled) -> int:
    return sum(n for access, n in kernel.accesses.items() if access.bits < 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_spills_nothing_and_moves_states_128_bits_at_a_time(architecture, dtype):
    kernel = compiled("forward_kernel", architecture, dtype)
    assert_lean(kernel)
    states = vectors(DTYPES[dtype], dtype)
    # the first tile of states and the next, a tile of the baseline; besides them the seed and one gate for a thread
    assert kernel.accesses[cubin.Access("LDG", 128)] == 2 * states + vectors(4, dtype)
    assert kernel.accesses[cubin.Access("STG", 128)] == states
    assert narrow(kernel) <= 5
    if dtype == "bf16":
        assert "cvt.rn.bf16" in kernel.ptx  # rounds to nearest, which the interpreter does not by itself


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backward_spills_nothing_and_moves_states_128_bits_at_a_time(architecture, dtype):
    kernel = compiled("backward_kernel", architecture, dtype)
    assert_lean(kernel)
    states, baseline = vectors(DTYPES[dtype], dtype), WIDTH * 4 // 16 // THREADS
    # these rows and the next of two tensors, a row of the baseline
    assert kernel.accesses[cubin.Access("LDG", 128)] == 2 * 2 * states + baseline
    assert kernel.accesses[cubin.Access("STG", 128)] == states + baseline
    assert narrow(kernel) <= 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finish_spills_nothing(architecture):
    assert_lean(compiled("finish_kernel", architecture))


@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel", "finish_kernel"])
@pytest.mark.parametrize(("gates", "width"), [(1, 1024), (64, 1024), (64, 32), (1, 300)])
def test_other_numbers_of_gates_and_widths_spill_nothing(name, gates, width):
    assert_lean(compiled(name, 90, "bf16", gates, width))


@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_four_dims_spill_nothing(name, architecture):
    kernel = compiled(name, architecture, "fp16", dims=2)
    assert kernel.resources.local == 0
    assert kernel.resources.stack <= 8  # a register or two are saved where a division is a call, outside of the loop
