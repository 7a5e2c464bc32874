"""Code written for the published package, with our gates: one import line differs.

It was `from diffmask.models.gates import DiffMaskGateInput`. A script that can't be edited runs unchanged with
`python -m diffmask_fast.compat SCRIPT`.
"""

import torch

from diffmask_fast.compat.diffmask import DiffMaskGateInput

LAYERS, BATCH, TOKENS, WIDTH = 14, 4, 32, 64

torch.manual_seed(0)
gate = DiffMaskGateInput(
    hidden_size=WIDTH,
    hidden_attention=WIDTH // 4,
    num_hidden_layers=LAYERS,
    max_position_embeddings=1,
    placeholder=True,
    init_vector=torch.zeros(WIDTH),
)
states = [torch.randn(BATCH, TOKENS, WIDTH) for _ in range(LAYERS)]
mask = torch.ones(BATCH, TOKENS)

new_state, gates, expected_l0, *_ = gate(states, mask, layer_pred=5)
loss = (new_state - states[0]).square().mean() + (expected_l0.exp() * mask).mean()
loss.backward()
print(f"loss {loss.item():.4f}, {(gates != 0).float().mean():.1%} of the gates open")
