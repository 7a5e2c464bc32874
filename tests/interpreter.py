"""Triton's interpreter, which runs kernels on the CPU in a process whose environment says so before Triton's import."""

from __future__ import annotations

import os
from typing import Any

ON = os.environ.get("TRITON_INTERPRET") == "1"


def round_to_nearest() -> None:
    """From float32 to bfloat16, as a GPU does (test_cubins.py sees that it does); the interpreter truncates."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, mode)

    interpreter._convert_float = converted
