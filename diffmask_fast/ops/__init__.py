"""The fused operations `gate_mix` and `probe_logits`, the stream that gates are drawn from, the plain references."""

from diffmask_fast.ops.gate_mix import GateMix, gate_mix
from diffmask_fast.ops.philox import draw_seed, uniforms
from diffmask_fast.ops.probe_logits import probe_logits
from diffmask_fast.ops.probe_reference import Head

__all__ = ["GateMix", "Head", "draw_seed", "gate_mix", "probe_logits", "uniforms"]
