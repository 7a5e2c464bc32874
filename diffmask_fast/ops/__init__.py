"""The fused operation `gate_mix`, the stream that it draws from and its plain PyTorch reference."""

from diffmask_fast.ops.gate_mix import GateMix, gate_mix
from diffmask_fast.ops.philox import draw_seed, uniforms

__all__ = ["GateMix", "draw_seed", "gate_mix", "uniforms"]
