"""What the benchmarks share: contenders timed in turn, memory, bytes kept for backward, the rows that are printed."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
WARM_UP = 3


def in_turn(runs: dict[str, Run], device: str, rounds: int, warm_up: int = WARM_UP) -> dict[str, list[float]]:
    """Milliseconds of each run in each round. All take turns: a noisy machine is noisy for all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + warm_up):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn >= warm_up:  # the first turns warm caches and compile
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Median, and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    return {"ms": round(middle, 4), "spread_ms": round(high - low, 4)}


def speedup(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of each round: what both met at the same time cancels."""
    return round(statistics.median(s / f for s, f in zip(slow, fast, strict=True)), 2)


def peak_extra_bytes(run: Run, device: str, warm_up: Run | None = None) -> int:
    """The most memory that a run held at once beyond what was there before, its results among it. It is run once before
    that, or another one instead where it takes long."""
    (warm_up or run)()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory goes back to Linux, which then forgets its high-water mark of resident memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def bytes_kept(forward: Run, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward beyond the inputs themselves."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = forward()
    del result
    return sum(kept.values())


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache, or of the GPU's second level where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)


def refuse_if_wrong(name: str, got: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """No time is printed for a wrong result. Allowed is more than rounding, and far less than one wrong gate does."""
    allowed = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    worst = (got.double() - oracle).abs().max().item()
    if not worst <= allowed * max(1.0, oracle.abs().max().item()):
        raise SystemExit(f"{name} is off by {worst:.2e}: no time is printed for a wrong result")


def options(description: str, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options that all benchmarks have, beside those of a parser of its own."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description.splitlines()[0]
    parser.add_argument("--json", help="write the rows here too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if chosen.rounds < 2 or chosen.threads < 1:
        parser.error("expected --rounds of 2 or more, for a spread, and --threads of 1 or more")
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.error(
            f"--device {chosen.device}: PyTorch {torch.__version__} finds no GPU; leave it out to time the CPU"
        )
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    return chosen


def write_rows(rows: list[dict], path: str | None) -> None:
    if path:
        temporary = f"{path}.partial"
        with open(temporary, "w") as file:
            json.dump({"torch": torch.__version__, "machine": _machine(), "rows": rows}, file, indent=1)
        os.replace(temporary, path)


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return models[0] if models else "unknown"


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory is measured on Linux")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
