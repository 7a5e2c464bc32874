"""The CUDA sources compile, for GPUs that aren't there, to code that spills nothing and moves 16 bytes at a time."""

from __future__ import annotations

import re

import compiled
import cubin
import pytest
from compiled import ROOT, nvcc

DTYPES = {"Float32": 32, "BFloat16": 16, "Float16": 16}  # and the bits of a state
# The registers of a multiprocessor are shared by four blocks or more of 128 threads.
MOST_REGISTERS = 128

pytestmark = pytest.mark.skipif(compiled.NVCC is None, reason="there is no nvcc")


@pytest.fixture(scope="module", params=compiled.ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def code(request, tmp_path_factory) -> bytes:
    if cubin.cuobjdump() is None:
        pytest.skip("there is no cuobjdump")
    return compiled.cuda(request.param, tmp_path_factory.mktemp("cubin"))


def test_every_instantiation_is_there_without_spills_and_within_the_registers(code):
    found = {compiled.instantiation(name): resources for name, resources in cubin.resources(code).items()}
    expected = {(name, dtype, wide) for name in ("mix_forward", "mix_backward") for dtype in DTYPES for wide in (0, 1)}
    assert found.keys() == expected | {("finish_backward", None, False)}
    for kernel, resources in found.items():
        assert resources.stack == 0 and resources.local == 0, f"{kernel} spills: {resources}"
        assert resources.registers <= MOST_REGISTERS, f"{kernel} takes {resources.registers} registers"


def test_aligned_rows_move_16_bytes_at_a_time_and_others_one_state(code):
    for name, instructions in cubin.sass(code).items():
        kernel, dtype, wide = compiled.instantiation(name)
        # A generic access would be one whose address the compiler did not know to be global.
        assert not [line for line in instructions if re.search(r"\b(LD|ST)\.E", line)], name
        if dtype is None:
            continue
        accesses = cubin.global_accesses(instructions)
        stores = [access.bits for access in accesses if access.op == "STG"]
        if not wide:
            # Nothing but the seed, two numbers of 64 bits, is wider than a float.
            assert DTYPES[dtype] in stores and max(stores) <= 32
            assert [access.bits for access in accesses if access.bits > 32] == [64, 64]
        elif kernel == "mix_forward":
            # mixed, and a gate and a log_open for each lane
            assert sorted(stores) == [32, 32, 128, 128, 128, 128]
            assert [access.bits for access in accesses if access.op == "LDG" and access.bits < 64] == [32]  # a logit
        else:
            # gradients of states and baseline, and a dot product for each row
            assert sorted(stores) == [32, *[128] * (len(stores) - 1)] and len(stores) > 2
            assert [access.bits for access in accesses if access.op == "LDG" and access.bits < 64] == [32]


def test_no_multiply_is_fused_with_an_add_and_no_division_is_approximate(tmp_path):
    ptx = tmp_path / "gate_mix.ptx"
    nvcc("-arch=sm_90", "-ptx", str(ROOT / "csrc/gate_mix_cuda.cu"), "-o", str(ptx))
    text = ptx.read_text()
    assert "mul.rn.f32" in text and "div.rn.f32" in text
    assert not re.findall(r"\bfma\.\S+|\bdiv\.(?:approx|full)\S*|\S+\.ftz\S*", text)


def test_the_library_compiles_against_the_headers_of_any_torch(tmp_path):
    from torch.utils.cpp_extension import include_paths

    nvcc(
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{path}" for path in include_paths()),
        *("-c", str(ROOT / "csrc/library_cuda.cpp"), "-o", str(tmp_path / "library.o")),
    )
    assert (tmp_path / "library.o").stat().st_size > 0
