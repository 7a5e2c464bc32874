"""Everything that other code imports from the published DiffMask package: gates, distributions, getters and setters.

One import line changes, as `from .gates import DiffMaskGateInput` to
`from diffmask_fast.compat.diffmask import DiffMaskGateInput`; or none, see `diffmask_fast.compat.install`.
"""

from diffmask_fast.compat.distributions import BinaryConcrete, RectifiedStreched, Streched
from diffmask_fast.compat.gates import (
    DiffMaskGateHidden,
    DiffMaskGateInput,
    MLPGate,
    MLPMaxGate,
    PerSampleDiffMaskGate,
    PerSampleGate,
    PerSampleREINFORCEGate,
)
from diffmask_fast.compat.getters import bert_getter, bert_setter, gru_getter, gru_setter, toy_getter, toy_setter

__all__ = [
    "BinaryConcrete",
    "DiffMaskGateHidden",
    "DiffMaskGateInput",
    "MLPGate",
    "MLPMaxGate",
    "PerSampleDiffMaskGate",
    "PerSampleGate",
    "PerSampleREINFORCEGate",
    "RectifiedStreched",
    "Streched",
    "bert_getter",
    "bert_setter",
    "gru_getter",
    "gru_setter",
    "toy_getter",
    "toy_setter",
]
