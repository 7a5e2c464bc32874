"""A classifier that reads frozen word embeddings with a GRU, as the paper's (De Cao et al. 2020, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from diffmask_fast.sites import register_sites


class GRUConfig(PretrainedConfig):
    """Sizes of a `GRUClassifier`: `vocab_size`, `hidden_size` (of the word embeddings and of the GRU), `num_labels`."""

    model_type = "diffmask_fast_gru"

    def __init__(self, vocab_size: int = 1, hidden_size: int = 1, **more: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)


class GRUClassifier(PreTrainedModel):
    """Frozen word embeddings, a GRU of their width, and a linear layer on its state at the last token."""

    config_class = GRUConfig
    main_input_name = "input_ids"

    def __init__(self, config: GRUConfig) -> None:
        super().__init__(config)
        classes: Any = config.num_labels
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, classes)
        self.embedding.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stays."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """input_ids and attention_mask (B, T), padded on the right -> logits (B, classes), and with labels (B,) the
        cross-entropy. What else encoders take, such as token_type_ids, is not looked at."""
        states, _ = self.gru(self.embedding(input_ids))
        # a GRU only looks back, so the state at the last real position never saw the padding
        last = attention_mask.sum(1) - 1
        logits = self.output(states[torch.arange(len(last), device=last.device), last])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(GRUConfig.model_type, GRUConfig)
register_sites(GRUClassifier, [("embedding", "embedding", "output"), ("gru", "gru", "output", 0)])


def gru_on(encoder: nn.Module, id2label: dict[int, str]) -> GRUClassifier:
    """A `GRUClassifier` with a Hugging Face model's word embeddings; PyTorch's global generator draws the rest."""
    embeddings: Any = encoder
    words = embeddings.get_input_embeddings().weight.detach()
    config = GRUConfig(*words.shape, id2label=id2label, label2id={name: i for i, name in id2label.items()})
    model = GRUClassifier(config)
    model.embedding.weight.data.copy_(words)
    return model
