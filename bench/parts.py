"""What of a call of gate_mix on a CPU is the kernel, and what the host around it, beside a copy of the same states.

    python bench/parts.py [--json FILE] [--threads N] [--rounds N]

The operation is bound by memory, so a pass over the states is compared with `copy_` into memory that is there. All
parts take turns: each finds the caches as the others left them, and its own code gone from them too.
"""

from __future__ import annotations

import measure
import torch
from ops import DTYPES, LAW, forward, make, ours, step

from diffmask_fast.ops import cpu

SHAPES = [(8, 384, 1024, 1), (8, 384, 1024, 13), (8, 384, 1024, 26), (1, 384, 1024, 1)]


def parts(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, measure.Run]:
    """What is timed, by name; the operators write into memory that is there."""
    case = make(shape, dtype, "cpu")
    states, logits, baseline = (tensor.detach() for tensor in case[:3])
    mixed, grad_baseline = torch.empty_like(states), torch.empty_like(baseline)
    gates, log_open, grad_logits = (torch.empty_like(logits) for _ in range(3))
    grad_log_open, none = torch.ones_like(logits), states.new_empty(0)
    narrow, narrow_mixed, narrow_baseline = states[..., :1].contiguous(), mixed[..., :1].contiguous(), baseline[:1]
    operators = torch.ops.diffmask_fast

    def backward(grad: torch.Tensor | None, grad_baseline: torch.Tensor) -> None:
        operators.gate_mix_backward_cpu(
            *(grad, None, grad_log_open, states, logits, baseline, case.seed, *LAW, none, grad_logits, grad_baseline)
        )

    return {
        "copy": lambda: mixed.copy_(states),
        "forward kernel": lambda: operators.gate_mix_forward_cpu(
            states, logits, baseline, case.seed, *LAW, mixed, gates, log_open
        ),
        "its gates": lambda: operators.gate_mix_forward_cpu(
            narrow, logits, narrow_baseline, case.seed, *LAW, narrow_mixed, gates, log_open
        ),
        "forward": forward(ours("cpu"), case, lambda: case.seed),
        "backward kernel": lambda: backward(case.grad, grad_baseline),
        "its gates, backward": lambda: backward(None, none),
        "forward+backward": step(ours("cpu"), case, lambda: case.seed),
    }


def main() -> None:
    options = measure.options(str(__doc__))
    if options.device != "cpu" or cpu.unavailable() is not None:
        raise SystemExit(f"this measures the C++ backend: {cpu.unavailable() or '--device cpu'}")
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            times = measure.in_turn(parts(shape, dtype), "cpu", options.rounds)
            row = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "threads": options.threads}
            rows.append(row | {name: measure.summary(ms)["ms"] for name, ms in times.items()})
            named = "  ".join(f"{name} {ms:.3f}" for name, ms in list(rows[-1].items())[3:])
            print(f"{row['shape']!s:20} {row['dtype']:9} ms: {named}", flush=True)
    measure.write_rows(rows, options.json)


if __name__ == "__main__":
    main()
