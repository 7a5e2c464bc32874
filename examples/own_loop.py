"""A model and a training loop of one's own, compiled: which inputs of an `nn.TransformerEncoder` can be dropped?

The model's answer is the mean of the first three of eight tokens. Gates of one logit a position learn to keep these.
"""

import torch
from torch import nn

from diffmask_fast import gate_mix, patch, register_sites

TOKENS, WIDTH, KEPT, STEPS = 8, 16, 3, 300


class Summary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(20, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        outside = torch.arange(TOKENS, device=ids.device).expand(ids.shape) >= KEPT
        return self.encoder(self.words(ids), src_key_padding_mask=outside)[:, :KEPT].mean(1)


torch.manual_seed(0)
model = Summary().eval().requires_grad_(False)
register_sites(Summary, [("embedding", "words", "output"), ("layer {i}", "encoder.layers.*", "input")])
baseline = model.words.weight.mean(0)
logits = torch.full((TOKENS,), 2.0, requires_grad=True)
optimizer = torch.optim.Adam([logits], lr=0.1)


@torch.compile(fullgraph=True)
def masked(states: torch.Tensor, logits: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mixed, _, log_open = gate_mix(states, logits.expand(len(states), TOKENS).unsqueeze(-1), baseline, seed)
    return mixed, log_open


with patch(model) as patched:
    for step in range(STEPS):
        ids = torch.randint(20, (16, TOKENS))
        original, states = patched.run({"ids": ids}, capture=(0,))
        seed = torch.tensor([0, step])  # another draw each step, the same in each run
        mixed, log_open = masked(states[0], logits, seed)
        error = (patched.run({"ids": ids}, replace={0: mixed}).output - original).square().mean()
        loss = 20 * error + log_open.exp().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print("kept:", [position for position, logit in enumerate(logits.tolist()) if logit > 0])
