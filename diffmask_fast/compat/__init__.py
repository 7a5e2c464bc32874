"""The names and shapes of published DiffMask and Hard Concrete code, on the operations of this package.

One import line changes, or none with `install`. `diffmask`: gates, distributions, getters and setters of DiffMask;
`vision`: those of Vision DiffMask; `graphmask` and `l0`: the Hard Concrete gates of GraphMask and of pruning code;
`checkpoints`: published checkpoints, for the gates here or as a probe.
"""

from diffmask_fast.compat.install import Installed, install

__all__ = ["Installed", "install"]
