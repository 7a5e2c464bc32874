"""Print docs/api.md, the public names with their signatures and docstrings: python docs/make_api.py > docs/api.md"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

MODULES = (
    "diffmask_fast",
    "diffmask_fast.ops",
    "diffmask_fast.sites",
    "diffmask_fast.predictions",
    "diffmask_fast.training.evaluation",
    "diffmask_fast.attribution",
    "diffmask_fast.compat",
    "diffmask_fast.compat.diffmask",
    "diffmask_fast.compat.vision",
    "diffmask_fast.compat.graphmask",
    "diffmask_fast.compat.l0",
    "diffmask_fast.compat.cofi",
)
HEAD = """# Interface

What `import diffmask_fast` and its public modules offer, as their docstrings say it. The methods of `attribute` and
their options stand in `diffmask_fast/attribution/methods`, one file each; `diffmask-fast --help` tells of the command
line.
"""


def public_names(module: Any) -> list[str]:
    """What a module lists, or else what it defines without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(name for name in listed if name != "__version__" and callable(getattr(module, name)))
    here = (n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return sorted(name for name in here if not name.startswith("_") and callable(getattr(module, name)))


def methods(thing: Any) -> Iterator[tuple[str, Any]]:
    """The documented public methods that a class defines itself."""
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, function


def signature(thing: Any) -> str:
    """Without the addresses that some defaults print, and without the package's own long names."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<(?:function|class) ?'?([\w.]+)'?[^>]*>", r"\1", text)
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", text)
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations that were left as text


def described(title: str, thing: Any, level: int) -> str:
    lines = ["#" * level + f" {title}", "", "```", f"{title}{signature(thing)}", "```"]
    # a dataclass without a docstring gets its signature for one
    documentation = inspect.cleandoc(thing.__doc__ or "")
    if documentation and not (inspect.isclass(thing) and documentation.startswith(f"{thing.__name__}(")):
        lines += ["", "```text", documentation, "```"]
    return "\n".join(lines) + "\n"


def page() -> str:
    seen: set[int] = set()
    parts = [HEAD]
    for path in MODULES:
        module = importlib.import_module(path)
        parts.append(f"## {path}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        for name in public_names(module):
            thing = getattr(module, name)
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            parts.append(described(name, thing, 3))
            parts += [described(f"{name}.{method}", function, 4) for method, function in methods(thing)]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
