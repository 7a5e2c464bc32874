"""Load a Hugging Face model with the head that it was saved with."""

from __future__ import annotations

import os
from typing import Any


def load_for(path: str, task: str | None = None) -> Any:
    """The model in a folder or of a hub name, in float32, in evaluation mode.

    Args:
        path: folder or hub name.
        task: a part of the class name that the model must have, such as "QuestionAnswering".

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a model without a head, or with another than `task`; a damaged file.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    # a hub name is `name` or `owner/name`; what can only be a path must not be looked for on the hub
    if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: there is no such folder; give the folder of a model, or its name on the hub")
    try:
        names = transformers.AutoConfig.from_pretrained(path).architectures or []
        if not names or (task and task not in names[0]) or not hasattr(transformers, names[0]):
            raise ValueError(
                f"{path} holds a {names[0] if names else 'model that names no class'}; expected a "
                f"{task or 'model saved with its head'} model: give one that was fine-tuned for it"
            )
        return getattr(transformers, names[0]).from_pretrained(path, dtype=torch.float32).eval()
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error}): get them again") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is no model that can be loaded, here or from the hub: {reason}") from error
