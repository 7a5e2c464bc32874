"""Every architecture of the installed transformers, tiny: what works goes into docs/models.md."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from pathlib import Path

import architectures
import pytest
import torch

from diffmask_fast.files import replacing
from diffmask_fast.sites import sites_of

transformers = pytest.importorskip("transformers")

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
LARGEST = 20_000_000  # parameters, of a tiny one
GOAL = 0.9
HEAD = """# Models

Sites of the models of transformers {version}, each built tiny from its configuration class, with random weights, and
run on made-up text, pictures or sound; `make models` writes this page. A model *works* if its captured states are its
own `hidden_states` (where it gives as many as it has layers, else it says so), a replacement by the same state changes
no bit, a replaced state changes what follows and nothing else, stopping and resuming give the whole pass, and the model
stays as it was. A model with several stacks of layers is tested with the sites of the one that its inputs feed;
`patch(model, part)` gives those of another.

A class that isn't here, or does not work, gets an entry of its own:

```python
from diffmask_fast.sites import patch, register_sites

register_sites(
    MyModel,
    [
        ("embedding", "embedding", "output"),  # name, submodule, side: what stands there is the state
        ("layer {{i}}", "encoder.layers.*", "input"),  # one site for each child
        ("last", "encoder.layers.-1", "output"),
    ],
)
with patch(MyModel()) as patched:
    output, states = patched.run(inputs, capture=(0, 3))
```

Of {ran} that could be built and run so, {works} work: {share:.1%}. {rest} others could not: {why}.

| model | sites | first site | works |
|---|---|---|---|
"""


def built(name):
    """The model and inputs that it takes, or the word for why there are none."""
    try:
        config = architectures.tiny_config(transformers.CONFIG_MAPPING[name]())
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
        if size > LARGEST:
            return "not tiny", None
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
    except ImportError:
        return "another library is missing", None
    except Exception:
        return "no such configuration", None
    takes = set(inspect.signature(model.forward).parameters)
    for inputs in architectures.candidates(config):
        try:
            if set(inputs) <= takes and architectures.same(model(**inputs), model(**inputs)):
                return model, inputs
        except Exception:
            continue
    return "other inputs are needed", None


def found(model, inputs):
    """A row of the table, and whether the model works."""
    failed, notes = [], []
    try:
        sites = sites_of(model)
    except ValueError:
        return "", "", "no: declares no layers"
    for holds in architectures.PROPERTIES:
        try:
            holds(model, inputs)
        except Exception as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"{holds.__name__.replace('_', ' ')}: {words[0][:110]}"
            forgiven = "no hidden states to compare with" in reason or "no embedding" in reason
            (notes if forgiven else failed).append(words[0] if forgiven else reason)
    first = f"`{sites[0].module}`"
    return str(len(sites)), first, "no: " + "; ".join(failed) if failed else "; ".join(["yes", *notes])


@pytest.mark.models
def test_most_architectures_work_and_the_table_says_which():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows, missing = [], Counter()
    for name in sorted(config.model_type for config in transformers.MODEL_MAPPING):
        model, inputs = built(name)
        if inputs is None:
            missing[model] += 1
            continue
        with torch.no_grad():
            rows.append((name, *found(model, inputs)))
    works = sum(row[-1].startswith("yes") for row in rows)
    head = HEAD.format(
        version=transformers.__version__,
        ran=len(rows),
        works=works,
        share=works / len(rows),
        rest=missing.total(),
        why=", ".join(f"{reason} ({n})" for reason, n in missing.most_common()),
    )
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    with replacing(TABLE) as file:
        Path(file).write_text(head + "\n".join(lines) + "\n")
    assert works >= GOAL * len(rows), [row for row in rows if row[-1].startswith("no")]
