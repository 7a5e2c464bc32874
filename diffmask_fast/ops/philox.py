"""The stream of uniforms that every backend draws from.

The contract, the same for NumPy, PyTorch, C++ and whatever comes later:

* The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
* A stream is named by two 64-bit integers, ``seed`` and ``offset``. The key is (low 32 bits of ``seed``, high
  32 bits of ``seed``).
* Element ``i`` (its row-major index in the logical tensor, whatever the strides, blocks or threads) takes
  word ``i % 4`` of the call whose 128-bit counter has ``(offset + i // 4) mod 2^64`` in its low 64 bits and
  zero in its high 64 bits.
* The uniform is ``((word >> 9) + 0.5) * 2^-23``. Every step of that is exact in float32, and the result lies
  in [2^-24, 1 - 2^-24], symmetric about one half: neither ``log u`` nor ``log(1 - u)`` is ever infinite. With
  24 bits instead of 23 the largest value would round to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def draw_seed(generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """Draw the name of a stream, an int64 tensor of shape (2,): (seed, offset).

    ``generator`` is advanced; without one, PyTorch's global generator of ``device`` is. ``device`` is where
    the seed is needed; without it, the generator's own device or the CPU. Both values lie in [0, 2^63 - 1),
    while ``uniforms`` and ``gate_mix`` accept any int64.
    """
    drawn_on = generator.device if generator is not None else device
    seed = torch.randint(0, 2**63 - 1, (2,), generator=generator, device=drawn_on, dtype=torch.int64)
    return seed if device is None else seed.to(device)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on 32-bit words held in int64 tensors that broadcast; returns the four output words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product keeps the low 64 bits, and those are the product's bits also where its sign
        # is wrong.
        p0 = c0 * MULTIPLIERS[0]
        p1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & _LOW_32, _high(p0) ^ c3 ^ k1, p0 & _LOW_32
        k0 = (k0 + KEY_STEPS[0]) & _LOW_32
        k1 = (k1 + KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3


def uniforms(seed: Tensor, n: int) -> Tensor:
    """The first ``n`` uniforms of the stream ``seed`` (int64, (2,)): float32, (n,), on the seed's device."""
    counter = seed[1] + torch.arange((n + 3) // 4, device=seed.device)
    zero = torch.zeros_like(counter)
    key = (seed[0] & _LOW_32, _high(seed[0]))
    words = torch.stack(philox4x32((counter & _LOW_32, _high(counter), zero, zero), key), dim=-1)
    return ((words.flatten()[:n] >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _LOW_32
