from __future__ import annotations

import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_probe import a_probe

pytest.importorskip("transformers")
from diffmask_fast.data import encode
from diffmask_fast.masking import frozen
from diffmask_fast.sites import patch, register_sites
from diffmask_fast.training import attention
from diffmask_fast.training.backbone import checkpointed, compiled, multiplies_bfloat16, running_in
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.trainer import train_probe


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was_to_the_last_bit(tiny_bert: Any, fails: bool) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation="sdpa")
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    plain = model(**inputs).logits
    try:
        with running_in(model, torch.bfloat16):
            assert all(p.dtype == torch.bfloat16 for p in model.parameters())
            rounded = model(**inputs).logits
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert rounded.dtype == torch.bfloat16
    # weights and every layer's result are rounded to 8 bits; logits of a tiny random model are well below 1
    assert 0 < (rounded.float() - plain).abs().max() < 0.05
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1], name
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("dtype", "own", "expected"),
    [
        (torch.bfloat16, "sdpa", attention.NAME),
        (torch.float16, "sdpa", attention.NAME),
        (torch.bfloat16, "eager", "eager"),
        (torch.float32, "sdpa", "sdpa"),
        (None, "sdpa", "sdpa"),
    ],
)
def test_sdpa_alone_is_replaced_and_in_16_bits_alone(tiny_bert: Any, dtype: Any, own: str, expected: str) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation=own)
    with running_in(model, dtype):
        assert model.config._attn_implementation == expected
    assert model.config._attn_implementation == own


def test_without_a_dtype_nothing_changes(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification")
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with running_in(model, None):
        assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_model_without_a_configuration_runs_too() -> None:
    model = torch.nn.Linear(3, 2)
    with running_in(model, torch.bfloat16):
        assert model(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointed_layers_give_a_steps_loss_and_gradients_to_the_last_bit(
    masking: str, bf16: bool, tiny_bert: Any
) -> None:
    model = tiny_bert("ForQuestionAnswering")
    ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [5], [7], [9]])).long()}
    runs = []
    with frozen(model), running_in(model, torch.bfloat16 if bf16 else None), patch(model) as patched:
        objective = Objective(patched, a_probe(masking), Recipe()).eval()
        objective.draw_sites = lambda count: torch.tensor([2, 0, 3, 1])
        for wrap in (lambda layers: nullcontext(), checkpointed):
            with wrap(patched.layers):
                torch.manual_seed(1)
                loss = objective(**inputs)["loss"]
                runs.append([loss, *torch.autograd.grad(loss, list(objective.probe.parameters()))])
    # the same operations on the same numbers
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert all(value.abs().sum() > 0 for value in runs[0])


def test_of_a_checkpointed_layer_little_is_kept_and_it_runs_again_with_what_a_hook_put_there(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    ran: list[int] = []
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    new = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3), requires_grad=True)
    kept: list[int] = []
    gradients = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    with frozen(model), patch(model) as patched:
        for wrap, runs_again in ((lambda layers: nullcontext(), []), (checkpointed, [1, 0])):
            kept.append(0)
            with wrap(patched.layers), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                ran.clear()
                output = patched.run(inputs, replace={1: lambda state: state * new}).output
                assert ran == [0, 1]
                gradients += torch.autograd.grad(output.logits.square().sum(), new)
                assert ran == [0, 1, *runs_again]
    assert torch.equal(*gradients)
    entered = 2 * new.nbytes  # which a checkpoint holds, but not as a saved tensor
    assert kept[1] + entered < kept[0] / 2


def test_a_training_with_checkpointed_layers_gives_the_same_probe(
    tiny_bert: Any, tokenizer: Any, tmp_path: Any
) -> None:
    model = tiny_bert("ForQuestionAnswering")
    texts = [("who was king ?", "the old king walked ."), ("what ?", "a cat in paris"), ("where ?", "the blue city")]
    examples, recipe = encode(tokenizer, texts, model), Recipe(epochs=3, batch_size=2)
    weights = []
    for option in (False, True):
        probe = a_probe()
        train_probe(model, probe, examples, recipe, tmp_path / str(option), checkpoint_layers=option, quiet=True)
        weights.append(probe.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, a_probe().state_dict()[name]) for name, value in weights[0].items())


def test_layers_with_a_site_inside_are_not_checkpointed(tiny_bert: Any, tokenizer: Any, tmp_path: Any) -> None:
    model = tiny_bert("ForQuestionAnswering")

    class Inner(type(model.bert)):
        pass

    rows = [("layer {i}", "encoder.layer.*", "input"), ("attention", "encoder.layer.1.attention.output", "output")]
    register_sites(Inner, rows)
    model.bert.__class__ = Inner
    examples = encode(tokenizer, [("who was king ?", "the old king walked .")], model)
    with pytest.raises(ValueError, match=r"checkpoint_layers: the site attention: .* stands within a layer"):
        train_probe(model, a_probe(sites=3), examples, Recipe(), tmp_path, checkpoint_layers=True, quiet=True)


@pytest.mark.parametrize("fails", [False, True])
def test_checkpointing_leaves_a_forward_that_stood_on_the_instance_there(tiny_bert: Any, fails: bool) -> None:
    first, second = tiny_bert("Model").encoder.layer
    first.forward = own = first.forward
    try:
        with checkpointed([first, second]):
            assert first.forward is not own and "forward" in vars(second)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert vars(first)["forward"] is own and "forward" not in vars(second)


@pytest.mark.slow
def test_compiled_layers_give_the_plain_states_whatever_is_captured_and_make_no_graph_for_each_site(
    tiny_bert: Any,
) -> None:
    model = tiny_bert("ForSequenceClassification")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with frozen(model), patch(model) as patched:
        plain = patched.run(inputs, capture=range(4))
        with compiled(patched.layers):
            graphs = []
            for site in (0, 3, 1, 2):
                for gradients in (False, True):
                    with torch.set_grad_enabled(gradients):
                        state = plain.states[site].clone().requires_grad_(gradients)
                        stopped = patched.run(inputs, capture=range(site + 1), stop=site).states
                        output = patched.run(inputs, resume=(site, state)).output
                    # float32 sums in another order: two layers, 16 wide, values of size 1
                    torch.testing.assert_close(output.logits, plain.output.logits, rtol=0, atol=1e-5)
                    torch.testing.assert_close(stopped[site], plain.states[site], rtol=0, atol=1e-5)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        assert 1 <= graphs[-1] <= 4  # with and without gradients, and whether a state needs one
        after = patched.run(inputs, capture=range(4))
    assert torch.equal(after.output.logits, plain.output.logits)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("device", ["cuda", "another accelerator", "x86_64", "aarch64"])
def test_bfloat16_is_for_devices_with_instructions_for_it(
    device: str, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerated = device in ("cuda", "another accelerator")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    monkeypatch.setattr(platform, "machine", lambda: device)
    # each is asked only where its answer counts
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has and device == "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has and device == "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert multiplies_bfloat16() == (has and device != "another accelerator")


def test_this_processor_is_known() -> None:
    flags = Path("/proc/cpuinfo")
    if torch.accelerator.is_available() or platform.machine() != "x86_64" or not flags.exists():
        pytest.skip("asks a Linux about its x86 processor")
    assert multiplies_bfloat16() == ("avx512_bf16" in flags.read_text())
