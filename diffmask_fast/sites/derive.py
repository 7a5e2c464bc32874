"""Sites of a Hugging Face model that nobody registered: its input embedding and the stack of layers above it.

Site 0 is what `get_input_embeddings()` names. The layers are those that the model declares: the classes that it records
as its hidden states (`_can_record_outputs`) and those that no device map may split (`_no_split_modules`); without such,
a list as long as the configuration says that the stack is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd


class Derived(NamedTuple):
    """Paths from the model: of the container of the layers; of the module that embeds, None if it names none that
    gives a state per token; and of what holds both, if the same module embeds elsewhere too ("." is the part itself).
    """

    stack: str
    embedding: str | None = None
    within: str = ""


def derive(model: nn.Module, whole: nn.Module) -> Derived | None:
    """What this part of a whole model declares, or None if it declares no layers.

    Of several stacks it is the one that the embedding feeds: the encoder of an encoder and decoder, the language
    model of one that also sees.
    """
    stacks = _stacks(model)
    if not stacks:
        return None
    embeddings = _paths_of(model, _input_embedding(model))
    stack = max(
        stacks, key=lambda path: (max((len(_common(path, e)) for e in embeddings), default=0), -path.count("."))
    )
    # A part that is a model itself knows best: BART's own embedding is never called, that of its encoder is.
    for end in range(stack.count(".") + 1, 0, -1):
        prefix = ".".join(stack.split(".")[:end])
        own = _input_embedding(model.get_submodule(prefix))
        if own is not None:
            embeddings = _paths_of(model, own)
            break
    if not embeddings:
        return Derived(stack)
    embedding = max(embeddings, key=lambda path: len(_common(stack, path)))
    shared = len(_paths_of(whole, model.get_submodule(embedding))) > 1
    return Derived(stack, embedding, (_common(stack, embedding) or ".") if shared else "")


def reads_pictures(model: Any) -> bool:
    """Whether pictures are what a Hugging Face model takes first."""
    return getattr(model, "main_input_name", "") == "pixel_values"


def hands_on(layer: nn.Module) -> bool:
    """Whether the layers of a stack get more than the state from the first, which makes it: T5's position bias."""
    return "position_bias" in inspect.signature(type(layer).forward).parameters


def _input_embedding(model: Any) -> nn.Module | None:
    """None where the model has none, and for what has not the layers' tokens: convolutions, whose output has no
    dimension of tokens yet, and patches of a picture, which the token of the whole picture has yet to join."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    if isinstance(embedding, nn.Embedding):
        return embedding
    if reads_pictures(model) or not isinstance(embedding, nn.Module) or isinstance(embedding, _ConvNd):
        return None
    return embedding


def _paths_of(model: nn.Module, module: nn.Module | None) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [] if module is None else [path for path, other in named if other is module]


def _common(left: str, right: str) -> str:
    """The path that both begin with."""
    parts = []
    for a, b in zip(left.split("."), right.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def _stacks(model: nn.Module) -> list[str]:
    """Paths of the containers of layers, the outermost alone."""
    modules = list(model.named_modules())
    containers = [(path, m) for path, m in modules if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    parts = [(path, m) for path, m in modules if callable(getattr(m, "get_input_embeddings", None))]
    for is_stack in (_declared, _of_known_length):
        found: list[str] = []
        for path, container in containers:
            owners = [part for at, part in parts if not at or path.startswith(f"{at}.")]
            outermost = not any(path.startswith(f"{outer}.") for outer in found)
            if owners and outermost and is_stack(container, owners):
                found.append(path)
        if found:
            return found
    return []


def _declared(container: nn.Module, owners: list[nn.Module]) -> bool:
    names = {
        name for owner in owners for name in [*_recorded(owner), *(getattr(owner, "_no_split_modules", None) or [])]
    }
    return all(names & {cls.__name__ for cls in type(child).__mro__} for child in container.children())


def _of_known_length(container: nn.Module, owners: list[nn.Module]) -> bool:
    depth = getattr(getattr(owners[-1], "config", None), "num_hidden_layers", None)
    return len(list(container.children())) == depth and len({type(child) for child in container.children()}) == 1


def _recorded(model: nn.Module) -> Iterable[str]:
    """Names of the classes that transformers records as the hidden states."""
    specs = (getattr(model, "_can_record_outputs", None) or {}).get("hidden_states", ())
    for spec in specs if isinstance(specs, (list, tuple)) else (specs,):
        target = getattr(spec, "target_class", None) or getattr(spec, "class_name", None) or spec
        yield target if isinstance(target, str) else target.__name__
