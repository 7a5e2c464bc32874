from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmask_fast.masking import keep_probabilities
from diffmask_fast.ops.reference import LEFT, RIGHT, TEMPERATURE, log_open
from diffmask_fast.probes import Probe, load_probe, save_probe

SIZES = (12, 8, 8)


def a_probe(masking: str, sizes: tuple[int, ...] = SIZES, **settings) -> Probe:
    torch.manual_seed(0)
    return Probe(sizes, masking, **settings)


def some_states(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {i: torch.randn(2, 5, size, generator=generator, dtype=dtype) for i, size in enumerate(sizes)}


def test_input_masking_gives_one_logit_for_each_site_up_to_the_one_asked_for() -> None:
    probe = a_probe("input")
    assert [probe.logits(some_states(), site).shape for site in range(3)] == [(2, 5, 1), (2, 5, 2), (2, 5, 3)]


def test_hidden_masking_gives_one_logit_at_every_site() -> None:
    probe = a_probe("hidden")
    assert {probe.logits(some_states(), site).shape for site in range(3)} == {(2, 5, 1)}


def test_a_probe_asks_for_the_states_that_it_reads_and_no_others() -> None:
    for masking in ("input", "hidden"):
        probe = a_probe(masking)
        for site in range(3):
            needed = {i: state for i, state in some_states().items() if i in probe.reads(site)}
            probe.logits(needed, site)  # a state that is read but not named would be a KeyError
            for left_out in needed:
                with pytest.raises(KeyError):
                    probe.logits({i: state for i, state in needed.items() if i != left_out}, site)


def test_input_masking_replaces_at_the_embedding_and_hidden_masking_where_it_looks() -> None:
    assert [a_probe("input").target(site) for site in range(3)] == [0, 0, 0]
    assert [a_probe("hidden").target(site) for site in range(3)] == [0, 1, 2]
    assert [a_probe("hidden").baseline(site).shape for site in range(3)] == [(12,), (8,), (8,)]
    assert len(a_probe("input").baselines) == 1


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_silent_head_keeps_with_the_probability_that_its_bias_says(masking: str) -> None:
    probe = a_probe(masking, bias=5.0)
    for head in probe.heads:
        head.outer.parametrizations.weight.original0.data.zero_()  # the magnitude of the weight norm
    keep = keep_probabilities(probe, some_states())
    one = log_open(torch.tensor(5.0, dtype=torch.float64), TEMPERATURE, LEFT, RIGHT)
    gates = torch.tensor([1.0, 2.0, 3.0] if masking == "input" else [1.0] * 3, dtype=torch.float64)
    # a handful of float32 roundings of numbers below 1
    torch.testing.assert_close(
        keep[0, 0].double(), (gates * one).exp(), rtol=0, atol=8 * torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_fresh_probe_keeps_every_token(masking: str) -> None:
    assert (keep_probabilities(a_probe(masking), some_states()) > 0.5).all()


def test_bounded_logits_stay_within_the_bound_of_the_bias() -> None:
    probe = a_probe("input", bound=3.0, bias=1.0)
    for head in probe.heads:
        head.outer.parametrizations.weight.original0.data.fill_(1e3)
    logits = probe.logits(some_states(), 2)
    assert (logits - 1.0).abs().max() <= 3.0
    assert (logits - 1.0).abs().max() > 2.9  # and the bound is reached: it is not just small


def test_input_masking_is_bounded_by_ten_and_hidden_masking_not_at_all_unless_told() -> None:
    assert a_probe("input").bound == 10.0
    assert a_probe("hidden").bound is None
    assert a_probe("hidden", bound=2.0).bound == 2.0


def test_every_weight_matrix_is_weight_normed() -> None:
    for head in a_probe("input").heads:
        for layer in (head.inner, head.outer):
            magnitude = layer.parametrizations.weight.original0
            torch.testing.assert_close(layer.weight.norm(dim=1, keepdim=True), magnitude)
            with torch.no_grad():
                layer.parametrizations.weight.original1.mul_(3)  # the direction alone: the weight must not change
            torch.testing.assert_close(layer.weight.norm(dim=1, keepdim=True), magnitude)


@pytest.mark.parametrize(("masking", "bound"), [("input", 10.0), ("input", 2.5), ("hidden", None), ("hidden", 2.5)])
def test_logits_are_those_of_the_paper_spelled_plainly(masking: str, bound: float | None) -> None:
    probe = a_probe(masking, bound=bound, bias=5.0).double()
    states = some_states(dtype=torch.float64)
    for site in range(3):
        columns = []
        for i in range(site + 1) if masking == "input" else [site]:
            head = probe.heads[i]
            read = torch.cat([states[0], states[i]], -1) if masking == "input" else states[i]

            def weight(layer):
                g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
                return g * v / v.norm(dim=1, keepdim=True)

            out = torch.tanh(read @ weight(head.inner).T + head.inner.bias) @ weight(head.outer).T
            if bound is not None:
                out = bound * torch.tanh(out)
            columns.append(out[..., 0] + head.bias)
        # sums of at most 24 products of size 1 in float64
        torch.testing.assert_close(probe.logits(states, site), torch.stack(columns, -1), rtol=0, atol=1e-13)


def standardised(masking: str) -> Probe:
    """A probe for states that are far from 0 and of different loudness, and knows it."""
    probe = a_probe(masking, width=5, standardised=True)
    for name, buffer in probe.named_buffers():
        buffer.copy_(torch.linspace(0.1, 3, len(buffer)) * (-1 if name.endswith("mean") else 1))
    return probe


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_standardised_heads_read_states_less_their_mean_over_their_spread(masking: str) -> None:
    probe, plain = standardised(masking).double(), a_probe(masking, width=5).double()
    plain.load_state_dict({name: value for name, value in probe.state_dict().items() if name in plain.state_dict()})
    states = some_states(dtype=torch.float64)
    site, at = 2, 2 if masking == "input" else 0
    head, first = probe.heads[site], {"input": SIZES[0], "hidden": 0}[masking]
    wanted = {2: (states[2] - head.mean[first:]) / head.spread[first:]}
    if masking == "input":  # each head sees the first state with the same moments
        moments = (head.mean[:first], head.spread[:first])
        wanted |= {0: (states[0] - moments[0]) / moments[1], 1: states[1]}
    want, got = plain.logits(wanted, site)[..., at], probe.logits(states, site)[..., at]
    # sums of at most 20 products of size 30 in float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    one, other = (
        torch.autograd.grad(each.sum(), p.heads[site].inner.bias) for each, p in ((got, probe), (want, plain))
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("own_scale", [False, True])
def test_a_saved_probe_comes_back_bit_for_bit(masking: str, own_scale: bool, tmp_path: Path) -> None:
    probe = standardised(masking) if own_scale else a_probe(masking, width=5, bound=4.0, bias=1.5)
    save_probe(probe, tmp_path / "probe.safetensors", {"seed": 3, "model": "münchen"})
    back = load_probe(tmp_path / "probe.safetensors")
    assert back.config() == probe.config()
    assert back.meta == {"seed": 3, "model": "münchen"}
    before, after = probe.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for site in range(3):
        assert torch.equal(probe.logits(some_states(), site), back.logits(some_states(), site))


def test_a_probe_file_with_a_spread_of_0_is_refused(tmp_path: Path) -> None:
    probe = standardised("input")
    dict(probe.named_buffers())["heads.1.spread"][3] = 0
    save_probe(probe, tmp_path / "probe.safetensors")
    with pytest.raises(ValueError, match="is damaged: some spread of the states is not above 0"):
        load_probe(tmp_path / "probe.safetensors")


def test_a_missing_probe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: there is no such file"):
        load_probe(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_probe_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_probe(a_probe("input"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="is not a probe, or it is cut short"):
        load_probe(path)


@pytest.mark.parametrize(
    "metadata", [None, {"diffmask_fast": "{}"}, {"diffmask_fast": "[1]"}, {"diffmask_fast": "null"}]
)
def test_a_foreign_safetensors_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="not one that save_probe wrote"):
        load_probe(tmp_path / "foreign.safetensors")


def test_a_probe_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_probe(a_probe("hidden"), path)
    described = json.dumps({"format": "diffmask_fast.probe", "probe": a_probe("hidden").config(), "meta": {}})
    tensors = load_file(path)
    del tensors["heads.1.bias"]
    save_file(tensors, path, metadata={"diffmask_fast": described})
    with pytest.raises(ValueError, match=r"(?s)is damaged: .*heads\.1\.bias"):
        load_probe(path)


@pytest.mark.parametrize(
    "described",
    [
        {"format": "diffmask_fast.probe"},
        {"format": "diffmask_fast.probe", "probe": {"sizes": [4], "colour": "red"}, "meta": {}},
        {"format": "diffmask_fast.probe", "probe": {"sizes": "four"}, "meta": {}},
        {"format": "diffmask_fast.probe", "probe": {"sizes": [0]}, "meta": {}},
    ],
)
def test_a_probe_file_with_a_broken_description_is_refused(described: dict, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"diffmask_fast": json.dumps(described)})
    with pytest.raises(ValueError, match="is damaged"):
        load_probe(path)


def test_states_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="the state at site 1 is 9 wide; this probe was made for 8"):
        a_probe("hidden").logits(some_states((12, 9, 8)), 1)


@pytest.mark.parametrize("site", [-1, 3])
def test_a_site_that_is_not_there_is_refused(site: int) -> None:
    with pytest.raises(ValueError, match=rf"site is {site}; this probe has the sites 0 to 2"):
        a_probe("input").logits(some_states(), site)


def test_an_unknown_masking_is_refused() -> None:
    with pytest.raises(ValueError, match="masking is 'output'; expected one of input, hidden"):
        Probe([4], "output")


@pytest.mark.parametrize("sizes", [[], [4, 0], [-1]])
def test_sizes_that_are_none_or_not_positive_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="expected the width of the state at each site"):
        Probe(sizes)


def test_a_probe_with_numbers_that_are_not_finite_is_damaged(tmp_path: Path) -> None:
    probe = Probe([4, 4])
    torch.nn.init.constant_(probe.heads[1].bias, float("nan"))
    save_probe(probe, tmp_path / "probe.safetensors")
    with pytest.raises(ValueError, match="is damaged: some of its numbers are NaN"):
        load_probe(tmp_path / "probe.safetensors")


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width is 0; expected 1 or more"):
        Probe([4], width=0)
