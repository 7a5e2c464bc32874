"""Parameters learned for each text by itself under noise: what the methods that blur states have in common."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor

from diffmask_fast.attribution.batch import Batch
from diffmask_fast.attribution.methods import checks


def learned(
    batch: Batch,
    start: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    noise_like: Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> Tensor:
    """What minimises the loss of each text, starting from `start`, by Adam with one draw of noise a step.

    The losses of a batch are summed and Adam works on each number by itself, so that texts don't see each other.

    Args:
        batch: the texts.
        start: (B, T, ...), float32 or float64.
        loss: (parameters like `start`, noise (B, T, H)) -> (B,).
        noise_like: (B, T, H), whose shape and device the noise has; it is float32.
        steps, rate, seed: how many steps, Adam's learning rate, what the noise depends on beside the text.

    Raises:
        ValueError: `steps` below 1 or no int, a `rate` that is not above 0, a `seed` that is no int.
    """
    checks.learning(steps, rate, seed)
    draw = noise_of(batch, noise_like, seed)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(parameters, draw()).sum().backward()
            optimizer.step()
    return parameters.detach()


def noise_of(batch: Batch, like: Tensor, seed: int) -> Callable[[], Tensor]:
    """A function that draws standard normal noise (B, T, H), float32, 0 at padded places.

    Each text has a stream of its own that begins with its tokens (a picture's with its pixels) and the seed: the same
    text gets the same noise wherever it stands, whatever it stands with and however it is padded.
    """
    lengths = batch.real.sum(1).tolist()
    streams = []
    read = batch.inputs["input_ids" if "input_ids" in batch.inputs else "pixel_values"].cpu()
    for row, length in zip(read, lengths, strict=True):
        raw = (row[:length] if row.dim() == 1 else row).contiguous().view(torch.uint8)  # NumPy has no bfloat16
        key = crc32(raw.numpy().tobytes(), seed % 2**32)
        streams.append(torch.Generator(like.device).manual_seed(key))

    def draw() -> Tensor:
        noise = torch.zeros(like.shape, device=like.device)
        for row, length, stream in zip(noise, lengths, streams, strict=True):
            row[:length].normal_(generator=stream)
        return noise

    return draw
