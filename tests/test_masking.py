from __future__ import annotations

from typing import Any

import pytest
import torch

from diffmask_fast.masking import frozen, keep_probabilities
from diffmask_fast.ops.reference import log_open
from diffmask_fast.probes import Probe
from diffmask_fast.sites import patch


@pytest.fixture
def model(tiny_bert: Any) -> Any:
    return tiny_bert()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def a_probe(masking: str) -> Probe:
    torch.manual_seed(1)
    probe = Probe([16] * 4, masking)
    for baseline in probe.baselines:
        torch.nn.init.normal_(baseline)
    return probe


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, True), (0.5, False)])
def test_only_recurrent_layers_without_dropout_are_in_training_mode(dropout: float, expected: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.GRU(2, 2, num_layers=2, dropout=dropout))
    with frozen(model):
        assert [module.training for module in model.modules()] == [False, False, expected]
    assert all(module.training for module in model.modules())


def test_a_frozen_model_is_in_evaluation_mode_and_asks_for_no_gradient(model: Any) -> None:
    model.train()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_gets_back_each_flag_that_it_had(model: Any) -> None:
    model.train()
    model.bert.pooler.eval()
    model.classifier.weight.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt), frozen(model):
        raise KeyboardInterrupt
    assert model.training and model.bert.encoder.training and not model.bert.pooler.training
    assert not model.classifier.weight.requires_grad and model.classifier.bias.requires_grad


def test_keep_is_the_product_over_sites_for_input_masking_and_each_sites_own_for_hidden(
    model: Any, inputs: dict
) -> None:
    with torch.no_grad(), patch(model) as patched:
        states = patched.run(inputs, capture=range(4)).states
        for masking in ("input", "hidden"):
            probe = a_probe(masking)
            keep = keep_probabilities(probe, states)
            assert keep.shape == (2, 6, 4)
            for site in range(4):
                expected = log_open(probe.logits(states, site)).exp().prod(-1)
                torch.testing.assert_close(keep[..., site], expected, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
