"""The linear layers of a frozen model in bfloat16 on a CPU, against float64."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from diffmask_fast.masking import frozen
from diffmask_fast.training import linear
from diffmask_fast.training.backbone import X86, compiled, running_in

pytestmark = pytest.mark.skipif(
    platform.machine() not in X86 or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN does no products in bfloat16 on this processor",
)

UNIT = 2.0**-8  # what rounding to 8 bits may change, as a share


def layer_of(inner: int, outer: int, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inner, outer, bias, dtype=torch.bfloat16).requires_grad_(False)


def states_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


STATES = {
    "rows": lambda inner: states_of(5, inner),
    "texts": lambda inner: states_of(3, 7, inner),
    "one row": lambda inner: states_of(inner),
    "none": lambda inner: states_of(2, 0, inner),
    "every other row": lambda inner: states_of(3, 14, inner)[:, ::2],
    "transposed": lambda inner: states_of(inner, 7, 3).transpose(0, 2),
    "expanded": lambda inner: states_of(3, 1, inner).expand(3, 7, inner),
}


@pytest.mark.parametrize("states", STATES.values(), ids=STATES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_float64(states: Any, bias: bool) -> None:
    layer = layer_of(48, 80, bias)
    given = states(48).requires_grad_()
    exact = given.detach().double().requires_grad_()
    parameters = [p.double() for p in layer.parameters()]
    out, truth = linear.forward(layer, given), torch.nn.functional.linear(exact, *parameters)
    grad = states_of(*out.shape, 2)[..., 0]  # not contiguous
    (got,) = torch.autograd.grad(out, given, grad)
    (wanted,) = torch.autograd.grad(truth, exact, grad.double())
    assert out.dtype == got.dtype == torch.bfloat16
    # sums of up to 81 terms in float32, of magnitudes that `sizes` bounds, then one rounding to 8 bits
    weight = parameters[0].abs()
    for one, other, sizes in (
        (out, truth, torch.nn.functional.linear(exact.abs(), weight, *(p.abs() for p in parameters[1:]))),
        (got, wanted, grad.double().abs() @ weight),
    ):
        assert one.shape == other.shape
        assert ((one.double() - other).abs() <= UNIT * other.abs() + 82 * 2.0**-24 * sizes).all()


def test_gradients_have_gradients() -> None:
    """As the layer's own have."""
    layer, states = layer_of(16, 16), states_of(4, 16).requires_grad_()
    seconds = []
    for run in (torch.nn.Linear.forward, linear.forward):
        (first,) = torch.autograd.grad(run(layer, states).square().sum(), states, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), states)[0].double())
    # each of three products rounds once
    torch.testing.assert_close(*seconds, rtol=0, atol=8 * UNIT * seconds[0].abs().max().item())
    assert seconds[0].abs().sum() > 0


def calls(monkeypatch: Any) -> list[tuple[int, ...]]:
    """Shapes that go through the product from now on."""
    shapes: list[tuple[int, ...]] = []
    apply = linear._Product.apply

    def noted(states: torch.Tensor, *more: Any) -> torch.Tensor:
        shapes.append(tuple(states.shape))
        return apply(states, *more)

    monkeypatch.setattr(linear._Product, "apply", noted)
    return shapes


def test_a_model_has_them_in_bfloat16_and_its_own_again_afterwards(tiny_bert: Any, monkeypatch: Any) -> None:
    model = tiny_bert("ForSequenceClassification", attn_implementation="eager")
    ids, shapes = torch.tensor([[5, 6, 7]]), calls(monkeypatch)
    linears = [part for part in model.modules() if type(part) is torch.nn.Linear]
    with frozen(model), torch.no_grad():
        plain = model(ids).logits
        assert not shapes
        with running_in(model, torch.bfloat16):
            ours = model(ids).logits
            assert len(shapes) == len(linears) > 10
            for part in linears:
                del part.forward
            own = model(ids).logits
        torch.testing.assert_close(ours, own, rtol=4 * UNIT, atol=4 * UNIT)
        assert torch.equal(model(ids).logits, plain)
    assert not any("forward" in vars(part) for part in model.modules())


def test_afterwards_it_has_its_own_again_when_something_fails(tiny_bert: Any) -> None:
    model = tiny_bert("ForSequenceClassification")
    with pytest.raises(KeyError), running_in(model, torch.bfloat16):
        assert any("forward" in vars(part) for part in model.modules())
        raise KeyError
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
def test_in_other_dtypes_all_stay_as_they_are(tiny_bert: Any, dtype: Any) -> None:
    model = tiny_bert("ForSequenceClassification")
    with running_in(model, dtype):
        assert not any("forward" in vars(part) for part in model.modules())


class Doubled(torch.nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def test_what_is_not_a_plain_linear_layer_stays_as_it_is() -> None:
    wrapped = torch.nn.Linear(4, 4)
    wrapped.forward = lambda states: states  # type: ignore[method-assign]
    model = torch.nn.Sequential(Doubled(4, 4), wrapped, torch.nn.Linear(4, 4))
    before = wrapped.forward
    with running_in(model, torch.bfloat16):
        assert "forward" not in vars(model[0]) and wrapped.forward is before and "forward" in vars(model[2])
    assert wrapped.forward is before


def test_a_layer_that_learns_gets_its_gradients() -> None:
    layer, states = layer_of(8, 4).requires_grad_(), states_of(3, 8)
    linear.forward(layer, states).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    assert layer.bias.grad is not None and (layer.bias.grad == 3).all()


def test_states_of_another_dtype_are_refused_as_the_layer_itself_does() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        linear.forward(layer_of(8, 4), torch.zeros(3, 8))


def test_hooks_see_what_they_saw() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    seen = []
    model[0].register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)) or out + 1)
    with frozen(model), running_in(model, torch.bfloat16):
        out = model(states_of(3, 8))
        assert torch.equal(out, linear.forward(model[0], states_of(3, 8)) + 1)
    assert seen == [((3, 8), (3, 4))]


def test_compiled_layers_take_their_own(monkeypatch: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    shapes = calls(monkeypatch)
    with frozen(model), running_in(model, torch.bfloat16):
        plain = model(states_of(3, 8))
        assert len(shapes) == 1
        with compiled([model]):
            assert torch.equal(model(states_of(3, 8)), plain)
        assert len(shapes) == 1
