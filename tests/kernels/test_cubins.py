"""The Triton kernels compile, for GPUs that aren't there, to code that spills nothing and moves 128 bits at a time."""

from __future__ import annotations

import compiled
import cubin
import interpreter
import pytest
from compiled import ARCHITECTURES, GATE_MIX, SIZES

pytest.importorskip("triton")
if interpreter.ON:
    pytest.skip("TRITON_INTERPRET=1 is in the environment: nothing is compiled", allow_module_level=True)
if cubin.cuobjdump() is None:
    pytest.skip("there is no cuobjdump", allow_module_level=True)

WIDTH = compiled.WIDTH
THREADS = 128
# Of a thread. A multiprocessor has room for five blocks of forward and finish, for three of backward, which has the
# next rows of two tensors on their way while it works on these.
MOST_REGISTERS = {"forward_kernel": 96, "backward_kernel": 168, "finish_kernel": 96}


def assert_lean(kernel: compiled.Kernel) -> None:
    assert kernel.resources.local == kernel.resources.stack == 0
    assert kernel.resources.registers <= MOST_REGISTERS[kernel.name]
    # A fused multiply-add or a rough division would give a gate other bits than on the CPU.
    assert "fma." not in kernel.ptx and "div.full" not in kernel.ptx and ".ftz" not in kernel.ptx
    assert "div.rn.f32" in kernel.ptx


def vectors(size: int, dtype: str) -> int:
    """How many 128-bit accesses a thread makes for a tile whose elements have `size` bytes."""
    tile = compiled.gate_mix_tile(dtype)
    assert tile.warps * 32 == THREADS
    return tile.rows * tile.columns * size // 16 // THREADS


def narrow(kernel: compiled.Kernel) -> int:
    return sum(n for access, n in kernel.accesses.items() if access.bits < 128)


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_spills_nothing_and_moves_states_128_bits_at_a_time(architecture, dtype):
    kernel = compiled.gate_mix("forward_kernel", architecture, dtype)
    assert_lean(kernel)
    states = vectors(SIZES[dtype], dtype)
    # the first tile of states and the next, a tile of the baseline; besides them the seed and one gate for a thread
    assert kernel.accesses[cubin.Access("LDG", 128)] == 2 * states + vectors(4, dtype)
    assert kernel.accesses[cubin.Access("STG", 128)] == states
    assert narrow(kernel) <= 5
    if dtype == "bf16":
        assert "cvt.rn.bf16" in kernel.ptx  # rounds to nearest, which the interpreter does not by itself


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backward_spills_nothing_and_moves_states_128_bits_at_a_time(architecture, dtype):
    kernel = compiled.gate_mix("backward_kernel", architecture, dtype)
    assert_lean(kernel)
    states, baseline = vectors(SIZES[dtype], dtype), WIDTH * 4 // 16 // THREADS
    # these rows and the next of two tensors, a row of the baseline
    assert kernel.accesses[cubin.Access("LDG", 128)] == 2 * 2 * states + baseline
    assert kernel.accesses[cubin.Access("STG", 128)] == states + baseline
    assert narrow(kernel) <= 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finish_spills_nothing(architecture):
    assert_lean(compiled.gate_mix("finish_kernel", architecture))


@pytest.mark.parametrize("name", GATE_MIX)
@pytest.mark.parametrize(("gates", "width"), [(1, 1024), (64, 1024), (64, 32), (1, 300)])
def test_other_numbers_of_gates_and_widths_spill_nothing(name, gates, width):
    assert_lean(compiled.gate_mix(name, 90, "bf16", gates, width))


@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_four_dims_spill_nothing(name, architecture):
    kernel = compiled.gate_mix(name, architecture, "fp16", dims=2)
    assert kernel.resources.local == 0
    assert kernel.resources.stack <= 8  # a register or two are saved where a division is a call, outside of the loop
