"""A model whose reading is known, and texts for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffmask_fast.data import Examples
from diffmask_fast.sites import register_sites


class Reader(nn.Module):
    """Reads the second token and no other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.output = nn.Linear(8, 3)
        self.output.weight.data *= 10

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.output(self.embedding(input_ids)[:, 1])


register_sites(Reader, [("embedding", "embedding", "output")])


def read_examples(count: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(20, (2 + i % 4,), generator=generator).tolist() for i in range(count)]
    tokens = [[str(token) for token in row] for row in rows]
    return Examples(
        [{"input_ids": row} for row in rows], tokens, [[1] * len(row) for row in rows], lambda i, answer: str(answer)
    )
