from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import attention as bench
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffmask_fast.masking import frozen
from diffmask_fast.training import attention as module
from diffmask_fast.training.attention import attention
from diffmask_fast.training.backbone import running_in

EXAMPLES, HEADS, TOKENS, WIDTH = 2, 4, 5, 8
REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
LEFT = REAL.flip(1)
NEAR = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 2


def expanded(keys: Tensor) -> Tensor:
    return keys[:, None, None].expand(EXAMPLES, 1, TOKENS, TOKENS)


MASKS = {
    "none": None,
    "causal": None,
    "padding": expanded(REAL),
    "padding, in memory of its own": expanded(REAL).contiguous(),
    "padding on the left": expanded(LEFT),
    "near, with a query that sees no key": expanded(REAL) & NEAR,
    "a head each": torch.rand(EXAMPLES, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7,
    "all examples alike": NEAR[None, None],
    "added": torch.zeros(EXAMPLES, 1, TOKENS, TOKENS).double().masked_fill(~expanded(REAL), -1e9),
    "infinity added, with a query that sees no key": torch.zeros(EXAMPLES, 1, TOKENS, TOKENS)
    .double()
    .masked_fill(~(expanded(REAL) & NEAR), -torch.inf),
}


def an_attention(causal: bool, heads: int) -> torch.nn.Module:
    made = torch.nn.Module()
    made.is_causal, made.num_key_value_groups = causal, HEADS // heads
    return made


def tensors(heads: int, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> list[Tensor]:
    """Query, key and value as a layer makes them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(EXAMPLES, tokens, h, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (HEADS, heads, heads)
    ]


def results(attend: Any, given: list[Tensor], mask: Tensor | None, causal: bool = False, **more: Any) -> list[Tensor]:
    query, key, value = given
    out, _ = attend(an_attention(causal, key.shape[1]), query, key, value, mask, scaling=0.3, **more)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, given, grad)]


@pytest.mark.parametrize("piece", [1, 3 * TOKENS * TOKENS, module.PIECE])  # a head, three, all
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_the_attention_of_sdpa(mask: str, heads: int, piece: int, monkeypatch: Any, poisoned_memory: Any) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    both = [
        results(attend, tensors(heads), MASKS[mask], mask == "causal") for attend in (attention, sdpa_attention_forward)
    ]
    for ours, theirs in zip(*both, strict=True):
        assert ours.shape == theirs.shape
        # float64: sums of at most forty products of size 1
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_the_truth_as_sdpa_with_weights_in_16_bits(dtype: torch.dtype) -> None:
    given = tensors(HEADS, dtype, tokens=64)
    exact = results(sdpa_attention_forward, [t.detach().double().requires_grad_() for t in given], None)
    ours = results(attention, given, None)
    # Weights and what goes through the softmax are rounded once more each, at sizes below those of what is summed:
    # a handful of roundings of numbers up to 8, of which eps / 2 is lost.
    for got, truth in zip(ours, exact, strict=True):
        assert (got.double() - truth).abs().max() < 5 * 8 * torch.finfo(dtype).eps / 2


def test_a_mask_that_is_learned_and_other_shapes_are_left_to_sdpa() -> None:
    query, key, value = tensors(HEADS)
    bias = torch.zeros(EXAMPLES, 1, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    for given, mask in (
        ((query, key, value), bias),
        ((query[:1], key, value), None),
        ((query, key, value), bias[0, 0]),
    ):
        both = []
        for attend in (attention, sdpa_attention_forward):
            out, _ = attend(an_attention(False, HEADS), *given, mask, scaling=0.3)
            wanted = (key,) if mask is None else (key, bias)
            both.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_a_long_text_is_left_to_sdpa(monkeypatch: Any) -> None:
    for longest, runs in ((TOKENS, 1), (TOKENS - 1, 0)):
        calls = []
        monkeypatch.setattr(module, "LONGEST", longest)
        monkeypatch.setattr(module, "_pieces", lambda *given, calls=calls: calls.append(given) or [])
        attention(an_attention(False, HEADS), *tensors(HEADS), None)
        assert len(calls) == runs


def test_nothing_is_kept_for_backward_but_what_entered() -> None:
    given, kept = tensors(HEADS), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(an_attention(False, HEADS), *given, MASKS["near, with a query that sees no key"])
    assert sorted(t.shape[-1] for t in kept) == [TOKENS, WIDTH, WIDTH, WIDTH]  # the mask, query, key, value


def test_the_operations_are_registered_as_torch_wants_them() -> None:
    for mask, causal in (
        (MASKS["padding"], False),
        (MASKS["near, with a query that sees no key"], False),
        (None, True),
    ):
        torch.library.opcheck(torch.ops.diffmask_fast.attention, (*tensors(HEADS), mask, causal))


def test_compiled_it_is_one_graph_for_all_masks_of_a_kind() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    for mask in (MASKS["padding"], MASKS["near, with a query that sees no key"], MASKS["padding on the left"]):
        plain, whole = (results(attend, tensors(HEADS), mask.contiguous()) for attend in (attention, compiled))
        for one, other in zip(plain, whole, strict=True):
            assert torch.equal(one, other)
    assert len(graphs) == 1


def test_a_position_bias_counts_in_16_bits_too() -> None:
    """T5's attention hands it over beside the mask."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, num_heads=4, num_layers=2, d_ff=32, dropout_rate=0, num_decoder_layers=0
    )
    model = transformers.T5EncoderModel(config).eval()
    if model.config._attn_implementation != "sdpa":
        pytest.skip("this transformers has no sdpa for T5")
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias.mul_(20)
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with frozen(model), torch.no_grad():
        plain = model(ids).last_hidden_state
        with running_in(model, torch.bfloat16):
            rounded = model(ids).last_hidden_state.float()
        bias.zero_()
        without = model(ids).last_hidden_state
    assert (rounded - plain).abs().max() < 0.1 * (without - plain).abs().max()


def test_a_model_that_masks_by_the_name_of_its_attention_keeps_it() -> None:
    config = getattr(transformers, "DeepseekV32Config", None)
    if config is None:
        pytest.skip("this transformers has no model that does")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    model = transformers.DeepseekV32ForCausalLM(config(vocab_size=40, **sizes, **heads, n_routed_experts=8))
    assert model.config._attn_implementation == "sdpa"
    with running_in(model, torch.bfloat16):
        assert model.config._attn_implementation == "sdpa"


def test_the_benchmark_has_a_row_for_each_mask_and_refuses_what_is_wrong(monkeypatch: Any) -> None:
    rows = bench.rows_of((2, 9, 2, 8), 2)
    assert [row["mask"] for row in rows] == ["none", "causal", "padding", "neighbours"]
    assert all(row["ms"] > 0 and row["speedup"] > 0 for row in rows)
    monkeypatch.setattr(bench, "attention", lambda *given: (attention(*given)[0] * 1.5, None))
    with pytest.raises(SystemExit, match="attention is off by"):
        bench.rows_of((2, 9, 2, 8), 2)


def test_a_padded_text_has_the_states_of_the_text_alone(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation="sdpa")
    alone = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    padded = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in alone.items()}
    with running_in(model, torch.bfloat16), torch.no_grad():
        one, other = model(**alone).logits, model(**padded).logits
    # the same products of 8-bit mantissas, perhaps in another order
    torch.testing.assert_close(one, other, rtol=0, atol=0.02)
