"""Models of one's own: recurrent ones with packed sequences, PyTorch's encoder, adapters around a model."""

from __future__ import annotations

import architectures
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from diffmask_fast.sites import Site, patch, register_sites, sites_of


class Recurrent(nn.Module):
    """Embedding, a recurrent network of packed sequences, the mean over each one's own steps."""

    def __init__(self, kind, bidirectional, is_sorted):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.rnn = kind(12, 8, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.classifier = nn.Linear(8 * (1 + bidirectional), 3)
        self.is_sorted = is_sorted

    def forward(self, input_ids, lengths):
        states = pack_padded_sequence(self.embedding(input_ids), lengths, True, self.is_sorted)
        outputs, _ = self.rnn(states)
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return self.classifier(padded.sum(1) / lengths[:, None])


register_sites(
    Recurrent, [("embedding", "embedding", "output"), ("packed", "rnn", "input"), ("states", "rnn", "output", 0)]
)


class Encoder(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, **settings)

    def forward(self, input_ids, lengths):
        padding = torch.arange(input_ids.shape[1]) >= lengths[:, None]
        return self.encoder(self.embedding(input_ids), src_key_padding_mask=padding)


register_sites(
    Encoder,
    [
        ("embedding", "embedding", "output"),
        ("layer {i}", "encoder.layers.*", "input"),
        ("last", "encoder.layers.-1", "output"),
    ],
)

LENGTHS = {True: [7, 5, 5, 2], False: [5, 2, 7, 5]}


def inputs(is_sorted):
    ids = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "lengths": torch.tensor(LENGTHS[is_sorted])}


@pytest.fixture(params=["GRU", "LSTM", "bidirectional LSTM", "bidirectional GRU, lengths in any order", "encoder"])
def own(request):
    torch.manual_seed(0)
    name, is_sorted = request.param, "any order" not in request.param
    if name == "encoder":
        return Encoder(enable_nested_tensor=False).eval(), inputs(True)
    kind = nn.GRU if "GRU" in name else nn.LSTM
    return Recurrent(kind, "bidirectional" in name, is_sorted).eval(), inputs(is_sorted)


@pytest.mark.parametrize("holds", architectures.PROPERTIES[1:], ids=lambda check: check.__name__)
def test_of_each_model(own, holds):
    model, given = own
    model.main_input_name = "input_ids"
    holds(model, given)  # with gradients, which PyTorch's encoder needs to run its layers one by one


def test_the_state_of_a_packed_sequence_is_padded(own):
    model, given = own
    if isinstance(model, Encoder):
        pytest.skip("packs nothing")
    states = patch(model).run(given, capture=(0, 1, 2)).states
    real = (torch.arange(7) < given["lengths"][:, None])[..., None]
    assert torch.equal(states[1], states[0] * real)
    packed = pack_padded_sequence(states[0], given["lengths"], True, model.is_sorted)
    assert torch.equal(states[2], pad_packed_sequence(model.rnn(packed)[0], batch_first=True)[0])
    beyond = patch(model).run(given, replace={2: states[2] + (~real)})
    assert torch.equal(beyond.output, model(**given))  # there is nothing beyond a sequence's end


def test_nested_tensors_are_refused_with_the_remedy():
    model = Encoder(enable_nested_tensor=True).eval()
    with torch.no_grad(), pytest.raises(TypeError, match=r"nested Tensor.*enable_nested_tensor=False"):
        patch(model).run(inputs(True), capture=(1,))


def test_the_calls_of_one_module_are_sites_of_their_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, x):
            return self.block(self.block(x))

    register_sites(Twice, [Site(f"call {i}", "block", "output", call=i) for i in range(2)])
    model, x = Twice(), torch.ones(1, 2)
    assert str(sites_of(model)[1]) == "call 1: output 0 of block, call 1"
    states = patch(model).run({"x": x}, capture=(0, 1)).states
    assert torch.equal(states[0], model.block(x)) and torch.equal(states[1], model(x))
    new = torch.zeros(1, 2)
    assert torch.equal(patch(model).run({"x": x}, replace={0: new}).output, model.block(new))
    assert torch.equal(patch(model).run({"x": x}, replace={1: new}).output, new)


def test_a_layer_that_stands_in_a_list_several_times_is_as_many_layers():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)] * 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    register_sites(Shared, [("block {i}", "blocks.*", "input"), ("last", "blocks.-1", "output")])
    model, given = Shared(), {"x": torch.ones(1, 2)}
    assert [site.call for site in sites_of(model)] == [0, 1, 2, 2]
    architectures.a_replacement_changes_what_follows_and_nothing_else(model, given)
    architectures.stop_and_resume_give_the_whole_pass(model, given)


@pytest.mark.parametrize(("layers", "groups"), [(4, 1), (5, 2), (3, 3)])
def test_the_shared_layers_of_albert_are_called_as_its_groups_say(layers, groups):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "embedding_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=layers, num_hidden_groups=groups)
    model = transformers.AlbertForMaskedLM(config).eval()
    assert len(sites_of(model)) == layers + 2
    given = {"input_ids": torch.randint(60, (2, 7))}
    with torch.no_grad():
        for holds in architectures.PROPERTIES:
            holds(model, given)


def test_a_part_that_there_is_not_is_refused(make_bert):
    with pytest.raises(ValueError, match=r"BertModel has no part 'decoder': name a submodule, from \['embeddings'"):
        patch(make_bert(), "decoder")


def test_runs_of_two_parts_of_one_model_are_refused_at_the_same_time():
    transformers = pytest.importorskip("transformers")
    config = architectures.tiny_config(transformers.T5Config())
    model = transformers.T5Model(config).eval()
    given = next(c for c in architectures.candidates(config) if "decoder_input_ids" in c)
    encoder, decoder = patch(model), patch(model, "decoder")
    with pytest.raises(RuntimeError, match="another run of this model"):
        encoder.run(given, replace={0: lambda state: decoder.run(given).output})


def test_a_model_with_adapters_has_the_sites_of_the_model_in_it(make_bert, inputs_of_bert):
    peft = pytest.importorskip("peft")
    model = make_bert("BertForSequenceClassification")
    names = [site.name for site in sites_of(model)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    assert [site.name for site in sites_of(adapted)] == names
    for holds in architectures.PROPERTIES:
        holds(adapted, inputs_of_bert)


@pytest.fixture
def inputs_of_bert(inputs):
    return inputs
