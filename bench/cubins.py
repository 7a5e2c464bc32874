"""Print what the Triton and CUDA kernels take on GPUs that need not be there, and how many warps of them fit.

    python bench/cubins.py [--json FILE]

Compiled as the tests do it: 26 gates, states 1,024 wide, heads 256 wide inside, everything aligned to 16 bytes. The
CUDA kernels are left out where there is no nvcc.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure

from diffmask_fast.ops.layout import ceil_divide

# The tests compile these kernels and read them back already, and must not need this folder for it.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import compiled
import cubin
import interpreter

DTYPES = ("fp32", "bf16")
NO_STATES = "–"  # of a kernel that reads none
CUDA_KERNELS = [
    compiled.Instantiation("mix_forward", "Float32", True),
    compiled.Instantiation("mix_forward", "BFloat16", True),
    compiled.Instantiation("mix_backward", "Float32", True),
    compiled.Instantiation("mix_backward", "BFloat16", True),
    compiled.Instantiation("finish_backward", None, False),
]

# Of a multiprocessor, by the tables of compute capabilities in NVIDIA's CUDA C++ Programming Guide ("Technical
# Specifications per Compute Capability"); 8.0, 9.0 and 10.0 differ in shared memory alone.
REGISTERS, WARPS, BLOCKS = 64 * 1024, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED = 1024  # bytes of shared memory that the system keeps of each block
# In what units a warp is given registers and a block shared memory, and among how many quarters of a multiprocessor its
# registers and warps are divided: cuda_occupancy.h of the CUDA toolkit.
REGISTER_UNIT, SHARED_UNIT, QUARTERS = 256, 128, 4


def resident_warps(used: cubin.Resources, architecture: int) -> int:
    """The warps that a multiprocessor holds at once: whole blocks, until registers, shared memory or room run out."""
    warps = ceil_divide(used.threads, 32)
    registers = ceil_divide(used.registers * 32, REGISTER_UNIT) * REGISTER_UNIT
    shared = ceil_divide(used.shared + RESERVED, SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // QUARTERS // registers * QUARTERS // warps
    return warps * min(by_registers, SHARED[architecture] // shared, WARPS // warps, BLOCKS)


def row(
    backend: str, kernel: str, states: str, architecture: int, used: cubin.Resources, accesses: Counter[cubin.Access]
) -> dict:
    resident = resident_warps(used, architecture)
    return {
        "backend": backend,
        "kernel": kernel,
        "states": states,
        "architecture": f"sm_{architecture}",
        "registers": used.registers,
        "threads": used.threads,
        "shared_bytes": used.shared,
        "spilled_bytes": used.stack + used.local,
        "load_bits": {str(a.bits): n for a, n in sorted(accesses.items(), reverse=True) if a.op == "LDG"},
        "resident_warps": resident,
        "occupancy": resident / WARPS,
    }


def variants(reads_states: bool) -> list[tuple[str, str]]:
    """The dtypes that a Triton kernel is compiled for, and how the table names them."""
    names = [(dtype, compiled.DTYPES[dtype]) for dtype in DTYPES]
    return names if reads_states else [(DTYPES[0], NO_STATES)]


def triton_rows() -> list[dict]:
    kernels: list[tuple[str, str, Callable[[int], compiled.Kernel]]] = []
    for name in compiled.GATE_MIX:
        for dtype, states in variants(reads_states=name != "finish_kernel"):
            kernels.append((name, states, partial(compiled.gate_mix, name, dtype=dtype)))
    for probe in compiled.PROBE_LOGITS:
        name = probe.name + (", few rows" if probe.blocks == "FEW_ROWS_BLOCKS" else "")
        for dtype, states in variants(reads_states="STATE" in probe.arguments):
            kernels.append((name, states, partial(compiled.probe_logits, probe, dtype=dtype)))
    rows = []
    for name, states, made_for in kernels:
        for architecture in compiled.ARCHITECTURES:
            made = made_for(architecture)
            rows.append(row("triton", name, states, architecture, made.resources, made.accesses))
    return rows


def cuda_rows() -> list[dict]:
    found = {}
    for architecture in compiled.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            code = compiled.cuda(architecture, Path(folder))
        instructions = cubin.sass(code)
        for name, used in cubin.resources(code).items():
            accesses = Counter(cubin.global_accesses(instructions[name]))
            found[compiled.instantiation(name), architecture] = used, accesses
    return [
        row("cuda", kernel.name, (kernel.dtype or NO_STATES).lower(), architecture, *found[kernel, architecture])
        for kernel in CUDA_KERNELS
        for architecture in compiled.ARCHITECTURES
    ]


def table(rows: list[dict]) -> str:
    """As Markdown."""
    heads = "backend kernel states GPU registers threads shared spilled loads warps occupancy".split()
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        loads = ", ".join(f"{n} × {bits}" for bits, n in r["load_bits"].items())
        cells = [*list(r.values())[:8], loads, f"{r['resident_warps']} of {WARPS}", f"{r['occupancy']:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", help="write the rows here too")
    options = parser.parse_args()
    if cubin.cuobjdump() is None or interpreter.ON:
        parser.error("needs Triton, which compiles and brings cuobjdump, and no TRITON_INTERPRET=1 in the environment")
    rows = triton_rows()
    if compiled.NVCC is not None:
        rows += cuda_rows()
    else:
        print("no nvcc: the CUDA kernels are left out", file=sys.stderr)
    print(table(rows))
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
