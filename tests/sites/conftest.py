"""Small models with random weights: BERT with any head, and a GRU classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffmask_fast.sites import register_sites


class GRUClassifier(nn.Module):
    """Embedding, GRU, the mean of its outputs, a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.gru = nn.GRU(12, 8, batch_first=True)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids):
        outputs, _ = self.gru(self.embedding(input_ids))
        return self.classifier(outputs.mean(1))


register_sites(GRUClassifier, [("embedding", "embedding", "output"), ("gru", "gru", "output", 0)])


@pytest.fixture
def gru():
    torch.manual_seed(0)
    return GRUClassifier().eval()


@pytest.fixture
def make_bert():
    """make_bert(head, attention, layers): a model in eval mode, the same for the same arguments."""
    transformers = pytest.importorskip("transformers")

    def make(head="BertModel", attention="eager", layers=3):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=24,
            initializer_range=0.5,
            attn_implementation=attention,
        )
        return getattr(transformers, head)(config).eval()

    return make


@pytest.fixture
def inputs():
    """Two sequences, the second padded."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "input_ids": torch.randint(1, 60, (2, 7), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]]),
    }


@pytest.fixture
def ids():
    return {"input_ids": torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(2))}


@pytest.fixture(
    params=[
        "Model",
        "ForSequenceClassification",
        "ForQuestionAnswering",
        "ForMaskedLM",
        "ForTokenClassification",
    ]
)
def head(request):
    return f"Bert{request.param}"


@pytest.fixture(params=["eager", "sdpa"])
def attention(request):
    return request.param


@pytest.fixture
def same():
    """same(output, output): whether two outputs of a model, with whatever head, are equal to the last bit."""

    def tensors(output):
        return (output,) if isinstance(output, torch.Tensor) else output.to_tuple()

    def compare(left, right):
        left, right = tensors(left), tensors(right)
        return len(left) == len(right) and all(map(torch.equal, left, right))

    return compare


@pytest.fixture
def attention_calls():
    """attention_calls(bert): a list that grows by a layer's number each time its attention runs."""

    def watch(model):
        calls = []
        for i, layer in enumerate(model.base_model.encoder.layer):
            layer.attention.register_forward_hook(lambda *_, i=i: calls.append(i))
        return calls

    return watch
