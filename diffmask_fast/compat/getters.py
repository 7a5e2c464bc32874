"""The getters and setters of the published DiffMask code, on `diffmask_fast.sites.patch`.

A getter returns `(outputs, states)`: what the model returns, and the hidden states that gates read. A setter runs the
model with some of them replaced: `hidden_states` has one entry for each, None to leave a state as it is.

Of a BERT with N layers there are N + 2: the output of the word embedding alone (before positions, token types and
LayerNorm), the inputs of the layers, the output of the last. Outputs unpack as tuples, as transformers' did when that
code was written, and keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffmask_fast.sites import patch

GRU_SITES = [("embedding", "emb", "output")]
TOY_SITES = [
    ("query", "embedding_query", "output"),
    ("input", "embedding_input", "output"),
    ("encoder", "encoder", "output"),
]
Rows = Sequence[tuple] | None
States = tuple[Tensor, ...]


class Outputs(tuple):
    """What a Hugging Face model returns, to be unpacked; its names stay."""

    named: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.named, name)

    def __getitem__(self, key: Any) -> Any:
        return self.named[key] if isinstance(key, str) else super().__getitem__(key)


def run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    hidden_states: Sequence[Tensor | None] | None = None,
    forward_fn: Callable[..., Any] | None = None,
    rows: Rows = None,
) -> tuple[Any, States]:
    """Run a model, with some of its states replaced if `hidden_states` is given, and return outputs and all states.

    Raises ValueError for another number of states than the model has, and what `patch` and its `run` do.
    """
    with patch(model, rows=rows) as patched:
        numbers = range(len(patched.sites))
        if hidden_states is not None and len(hidden_states) != len(numbers):
            raise ValueError(
                f"hidden_states has {len(hidden_states)} entries and {type(model).__name__} {len(numbers)} states: "
                "give one for each, None where the state is to stay"
            )
        given = {k: state for k, state in enumerate(hidden_states or ()) if state is not None}
        outputs, found = patched.run(inputs, capture=numbers, replace=given, call=forward_fn)
    if hasattr(outputs, "to_tuple"):
        named, outputs = outputs, Outputs(outputs.to_tuple())
        outputs.named = named
    return outputs, tuple(given.get(k, found[k]) for k in numbers)


def bert_getter(
    model: nn.Module, inputs_dict: Mapping[str, Any], forward_fn: Callable[..., Any] | None = None
) -> tuple[Any, States]:
    """For a BERT with any head, or any other model whose sites are known; `forward_fn` is called instead of it."""
    return run(model, inputs_dict, forward_fn=forward_fn)


def bert_setter(
    model: nn.Module,
    inputs_dict: Mapping[str, Any],
    hidden_states: Sequence[Tensor | None],
    forward_fn: Callable[..., Any] | None = None,
) -> tuple[Any, States]:
    """As `bert_getter`, with these states in place of the model's own where they aren't None."""
    return run(model, inputs_dict, hidden_states, forward_fn)


def gru_getter(model: nn.Module, inputs_dict: Mapping[str, Any]) -> tuple[Any, States]:
    """For a model with an embedding `emb`, whose output is the one state."""
    return run(model, inputs_dict, rows=GRU_SITES)


def gru_setter(
    model: nn.Module, inputs_dict: Mapping[str, Any], hidden_states: Sequence[Tensor | None]
) -> tuple[Any, States]:
    """As `gru_getter`, with this state in place of the model's own where it isn't None."""
    return run(model, inputs_dict, hidden_states, rows=GRU_SITES)


def toy_getter(model: nn.Module, inputs_dict: Mapping[str, Any]) -> tuple[Any, States]:
    """For a model of the toy task: the outputs of `embedding_query`, `embedding_input` and `encoder`."""
    return run(model, inputs_dict, rows=TOY_SITES)


def toy_setter(
    model: nn.Module, inputs_dict: Mapping[str, Any], hidden_states: Sequence[Tensor | None]
) -> tuple[Any, None]:
    """As published, returns None in the place of the states."""
    return run(model, inputs_dict, hidden_states, rows=TOY_SITES)[0], None
