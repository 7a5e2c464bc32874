"""Which hidden states of which model class can be read and replaced: a table, and the look-up in it.

Of a Hugging Face model that has no entry the rows are made from what it declares, see `derive`.

A row is `(name, module, side)` or `(name, module, side, index)`, the fields of `Site`. In `module`, a final
`*` stands for every child of a ModuleList, so that one row describes a stack of layers (the *chain*) of any
depth, and a negative number counts from the last child.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .derive import derive


@dataclass(frozen=True)
class Site:
    """A place where a hidden state stands.

    Args:
        name: what tables and plots call it. In a row with a `*`, `{i}` in it becomes the number of the layer.
        module: dotted path of the submodule, from the model.
        side: "input" or "output" of that submodule.
        index: which positional argument (input) or which entry of the output tuple (output) is the state; an
            output that is a tensor is its own entry 0.
        call: which of the calls of that submodule in a run of the model, if there are several.
        within: dotted path of a module, or "." for the part: only calls made while it runs count.
        times: in a row with `*` or -1, the name of the configuration's number of layers, if the children run more
            than once: each does for an equal stretch of the layers.
    """

    name: str
    module: str
    side: str
    index: int = 0
    call: int = 0
    within: str = ""
    times: str = ""

    def __str__(self) -> str:
        call = f", call {self.call}" if self.call else ""
        return f"{self.name}: {self.side} {self.index} of {self.module}{call}"


_SPEECH = (
    Site("embedding", "feature_projection", "output"),
    Site("layer {i}", "encoder.layers.*", "input"),
    Site("last", "encoder.layers.-1", "output"),
)
# By class, or by class name so that a library need not be imported to have an entry. The rows stand in the
# order in which the model runs, and each is a cut: what follows sees what precedes through that state alone,
# masks aside.
_ENTRIES: dict[type | str, tuple[Site, ...]] = {
    "AlbertModel": (
        Site("embedding", "embeddings.word_embeddings", "output"),
        Site("layer {i}", "encoder.albert_layer_groups.*", "input", times="num_hidden_layers"),
        Site("last", "encoder.albert_layer_groups.-1", "output", times="num_hidden_layers"),
    ),
    # These name no input embedding.
    "Wav2Vec2Model": _SPEECH,
    "Wav2Vec2ConformerModel": _SPEECH,
    "Data2VecAudioModel": _SPEECH,
    "HubertModel": _SPEECH,
    "UniSpeechModel": _SPEECH,
    "UniSpeechSatModel": _SPEECH,
    "WavLMModel": _SPEECH,
}


def register_sites(model_class: type[nn.Module] | str, rows: Iterable[tuple | Site]) -> None:
    """Give a model class (and its subclasses) its sites; a second call for the same class replaces the first.

    Args:
        model_class: the class, or its name.
        rows: `(name, module, side[, index])` or a `Site` each, in the order in which the model runs. What
            follows a site must see what precedes it through that state alone. At most one row may have a `*`;
            its layers hand one another nothing but the state.

    Raises:
        TypeError, ValueError: a row is not of that form.

    Example:
        >>> register_sites(GRUClassifier, [("embedding", "embedding", "output"), ("gru", "gru", "output", 0)])
    """
    if not isinstance(model_class, (type, str)):
        raise TypeError(
            f"register_sites: expected a model class or its name, got {type(model_class).__name__}: "
            "pass type(model), not the model"
        )
    _ENTRIES[model_class] = _entry_from(rows)


def _entry_from(rows: Iterable[tuple | Site]) -> tuple[Site, ...]:
    """The rows of one class, checked."""
    sites = tuple(_row(row) for row in rows)
    names = [site.name for site in sites]
    if not sites or len(set(names)) != len(names):
        raise ValueError(f"register_sites: expected at least one row, and every name once, got names {names}")
    if sum("*" in site.module for site in sites) > 1:
        raise ValueError("register_sites: at most one row may have a '*': the layers that resuming skips")
    return sites


def _row(row: tuple | Site) -> Site:
    form = "expected (name, module path, 'input' or 'output'[, index >= 0])"
    fields = (row.name, row.module, row.side, row.index) if isinstance(row, Site) else row
    if not isinstance(fields, tuple) or len(fields) not in (3, 4) or not all(isinstance(x, str) for x in fields[:3]):
        raise TypeError(f"register_sites: {form}, got {row!r}")
    site = row if isinstance(row, Site) else Site(*row)
    if site.side not in ("input", "output") or not isinstance(site.index, int) or site.index < 0:
        raise ValueError(f"register_sites: {form}, got {row!r}")
    starred = site.module.endswith(".*")
    if ("*" in site.module.removesuffix(".*")) or starred != ("{i}" in site.name):
        raise ValueError(f"register_sites: a path ends in '.*' just when the name has '{{i}}', got {row!r}")
    return site


def sites_of(model: nn.Module, part: str = "") -> tuple[Site, ...]:
    """The sites of a model, in the order in which it runs; the place in the tuple is the site's number.

    Looks for the model's class and its parents, then for those of its base model, so that every head of a
    Hugging Face model shares one entry; without one they are derived from what the model declares. Paths come back
    complete: from `model`, with numbers in place of `*` and -1.

    Args:
        model: the model.
        part: dotted path of a submodule: the sites are those in it. A model of several stacks of layers has those
            of the one that its input embedding feeds; others are named here, as in "decoder".

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such part; the class has no entry and declares none (the message shows how to make
            one); or a registered path isn't there.
    """
    return tuple(site for site, _ in expand(model, part))


def expand(
    model: nn.Module, part: str = "", rows: Iterable[tuple | Site] | None = None
) -> tuple[tuple[Site, bool], ...]:
    """Each site of a model, and whether it belongs to the chain. Raises as `sites_of`, or as `register_sites`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        inside = model.get_submodule(part)
    except AttributeError:
        parts = [name for name, _ in model.named_children()]
        raise ValueError(f"{type(model).__name__} has no part {part!r}: name a submodule, from {parts}") from None
    prefix, owner, entry = _rows(inside, model) if rows is None else ("", inside, _entry_from(rows))
    prefix = f"{part}.{prefix}" if part else prefix
    expanded: list[tuple[Site, bool]] = []
    for row in entry:
        for i, (path, call) in enumerate(_resolve(owner, row)):
            name, within = row.name.replace("{i}", str(i)), row.within and (prefix + row.within).rstrip(".")
            site = replace(row, name=name, module=prefix + path, call=call, within=within, times="")
            expanded.append((site, "*" in row.module))
    return tuple(expanded)


def _rows(model: nn.Module, whole: nn.Module) -> tuple[str, nn.Module, tuple[Site, ...]]:
    """The registered or derived rows for a model, and the path to the module from which their paths go."""
    _refuse_wrapper(model)
    prefix, base = _base(model)
    for path, owner in (("", model), (prefix, base)):
        entry = _entry(type(owner))
        if entry is not None:
            return path, owner, entry
    derived = derive(model, whole)
    if derived is None:
        raise ValueError(_how_to_register(model, base))
    rows: tuple[Site, ...] = (
        Site("layer {i}", f"{derived.stack}.*", "input"),
        Site("last", f"{derived.stack}.-1", "output"),
    )
    if derived.embedding is not None:
        rows = (Site("embedding", derived.embedding, "output", within=derived.within), *rows)
    return "", model, rows


def listing(sites: Iterable[Site]) -> str:
    """The numbered sites, for messages."""
    return "".join(f"\n    {k}  {site}" for k, site in enumerate(sites))


def _entry(model_class: type) -> tuple[Site, ...] | None:
    for cls in model_class.__mro__:
        entry = _ENTRIES.get(cls) or _ENTRIES.get(cls.__name__)
        if entry is not None:
            return entry
    return None


def _base(model: nn.Module) -> tuple[str, Any]:
    """The path and module of the Hugging Face base model in a model with a head or adapters; else the model itself."""
    adapted = getattr(model, "get_base_model", None)  # of PEFT
    if callable(adapted):
        inner: nn.Module = adapted()
        path = next(path for path, module in model.named_modules() if module is inner)
        prefix, base = _base(inner)
        return f"{path}.{prefix}", base
    name = getattr(type(model), "base_model_prefix", "")
    own = model._modules.get(name) if name else None
    return ("", model) if own is None else (f"{name}.", own)


def _refuse_wrapper(model: nn.Module) -> None:
    # A compiled module keeps running what it traced, with or without the hooks of that day; and what a
    # data-parallel wrapper adds is for models that are trained, which a probed model is not.
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name)
        if inner is None or len(model._modules) > 1 or _entry(type(model)):
            continue
        try:
            expand(inner)
        except ValueError:
            continue
        raise ValueError(
            f"{type(model).__name__} wraps the model that has the sites: pass the "
            f"{type(inner).__name__} inside it, model.{name}"
        )


def _resolve(owner: Any, row: Site) -> list[tuple[str, int]]:
    """The paths that a row's module path stands for in this instance, and which call of the module it is."""
    path = ""
    module: Any = owner
    parts = row.module.split(".")
    for part in parts:
        children = [name for name, child in module._modules.items() if child is not None]
        last = part is parts[-1]
        if last and row.times and children:
            layers = getattr(owner.config, row.times)
            children = [children[i * len(children) // layers] for i in range(layers)]
        from_last = part[:1] == "-" and part[1:].isdigit() and 0 < int(part[1:]) <= len(children)
        if children and (part == "*" or (last and from_last)):
            # A module that stands there several times is called as often.
            found = [module._modules[name] for name in children]
            calls = [sum(other is child for other in found[:i]) for i, child in enumerate(found)]
            every = [(f"{path}{name}", call) for name, call in zip(children, calls, strict=True)]
            return every if part == "*" else [every[int(part)]]
        name = children[int(part)] if from_last else part
        if name not in children:
            raise ValueError(
                f"the site '{row.name}' of {type(owner).__name__} is registered at '{row.module}', but here "
                f"{path.rstrip('.') or 'the model'} has no '{part}', only {children}: "
                "give the class rows that fit it with register_sites"
            )
        path, module = f"{path}{name}.", module._modules[name]
    return [(path.rstrip("."), row.call)]


def _how_to_register(model: nn.Module, owner: nn.Module) -> str:
    """The message for a class without an entry: the lines to write, with the modules that look right."""
    rows: list[tuple] = []
    embedding = next((path for path, m in owner.named_modules() if isinstance(m, nn.Embedding)), None)
    if embedding:
        rows.append(("embedding", embedding, "output"))
    stacks = [(len(m), path) for path, m in owner.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if stacks:
        path = max(stacks, key=lambda stack: stack[0])[1]
        rows += [("layer {i}", f"{path}.*", "input"), ("last", f"{path}.-1", "output")]
    rows += [(path, path, "output", 0) for path, m in owner.named_modules() if isinstance(m, nn.RNNBase)]
    if not rows:
        rows = [(name, name, "output") for name, _ in owner.named_children()]
    name = type(owner).__name__
    missing = type(model).__name__ + ("" if owner is model else f", nor for its base model {name}")
    lines = "\n".join(f"        {row!r}," for row in rows)
    return (
        f"no sites are registered for {missing}. Register them in the order in which the model runs; a guess "
        f"from its modules, to be checked:\n    from diffmask_fast.sites import register_sites\n"
        f"    register_sites({name}, [\n{lines}\n    ])"
    )
