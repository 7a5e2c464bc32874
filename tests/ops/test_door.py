from __future__ import annotations

import pytest
import torch

from diffmask_fast.ops import gate_mix

GOOD = {"states": torch.zeros(2, 3, 4), "logits": torch.zeros(2, 3, 5), "baseline": torch.zeros(4)}
SEED = torch.tensor([1, 2])
# what is changed, the error, words of its message
WRONG = [
    ({"states": [1.0]}, TypeError, "states is a list, expected a torch.Tensor"),
    ({"states": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "dense"),
    ({"states": torch.zeros(4)}, ValueError, "at least one dim before H"),
    ({"states": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "states are torch.int64"),
    ({"states": torch.zeros(2, 4, 3).transpose(1, 2)}, ValueError, r"\.contiguous\(\)"),
    ({"states": torch.zeros(2, 0, 4), "logits": torch.zeros(2, 0, 5)}, ValueError, "empty"),
    ({"states": torch.zeros(0, 3, 4), "logits": torch.zeros(0, 3, 5)}, ValueError, "empty"),
    ({"logits": torch.zeros(2, 3)}, ValueError, r"expected logits of shape \(2, 3\) \+ \(K,\)"),
    ({"logits": torch.zeros(3, 2, 5)}, ValueError, r"expected logits of shape"),
    ({"logits": torch.zeros(2, 3, 0)}, ValueError, "at least one gate"),
    ({"logits": torch.zeros(2, 3, 5, dtype=torch.int32)}, TypeError, "floating point"),
    ({"logits": torch.zeros(2, 3, 5, dtype=torch.float64)}, TypeError, "all three float64 or none"),
    ({"logits": torch.zeros(2, 3, 5, device="meta")}, ValueError, "logits is on meta and states on cpu"),
    ({"baseline": torch.zeros(1)}, ValueError, "does not broadcast"),
    ({"baseline": torch.zeros(())}, ValueError, "does not broadcast"),
    ({"baseline": torch.zeros(2, 4)}, ValueError, "does not broadcast"),
    ({"baseline": torch.zeros(1, 2, 3, 4)}, ValueError, "does not broadcast"),
    ({"baseline": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "baseline is torch.bfloat16"),
    ({"seed": 3}, TypeError, "seed is int"),
    ({"seed": torch.tensor([1])}, TypeError, r"shape \(1,\)"),
    ({"seed": torch.tensor([1.0, 2.0])}, TypeError, "float32"),
    ({"seed": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "seed is on meta"),
    ({"seed": SEED, "generator": torch.Generator()}, ValueError, "one of them"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": torch.tensor(0.2)}, TypeError, "temperature is a Tensor"),
    ({"left": 0.0}, ValueError, "left"),
    ({"right": 0.9}, ValueError, "right"),
    ({"backend": "gpu"}, ValueError, "'gpu' is not a backend"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_input_is_one_clear_error(change, error, words):
    with pytest.raises(error, match=words):
        gate_mix(**(GOOD | change))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_logit_that_is_not_finite_is_an_error_that_names_the_first_place(backend, value):
    logits = torch.zeros(2, 300, 5)
    logits[1, 299, 0] = value
    logits[1, 200, 3] = value
    with pytest.raises(ValueError, match=rf"row \(1, 200\), gate 3 is {value}"):
        gate_mix(torch.zeros(2, 300, 4), logits, GOOD["baseline"], backend=backend)


def test_the_cpp_operators_guard_the_memory_of_those_who_call_them_directly():
    good = gate_mix(**GOOD, backend="cpu")
    wide = torch.zeros(2, 3, 9)
    with pytest.raises(RuntimeError, match="baseline"):
        torch.ops.diffmask_fast.gate_mix_forward_cpu(
            wide, GOOD["logits"], GOOD["baseline"], SEED, 0.2, -0.2, 1.0, *good
        )
