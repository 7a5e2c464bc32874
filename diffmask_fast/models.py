"""Load a Hugging Face model with the head that it was saved with."""

from __future__ import annotations

from typing import Any


def load_for(path: str, task: str | None = None) -> Any:
    """The model in a folder or of a hub name, in float32, in evaluation mode.

    Args:
        path: folder or hub name.
        task: a part of the class name that the model must have, such as "QuestionAnswering".

    Raises:
        ValueError: a model without a head, or with another than `task`.
    """
    import torch
    import transformers

    names = transformers.AutoConfig.from_pretrained(path).architectures or []
    if not names or (task and task not in names[0]):
        raise ValueError(
            f"{path} holds a {names[0] if names else 'model that names no class'}; expected a "
            f"{task or 'model saved with its head'} model: give one that was fine-tuned for it"
        )
    return getattr(transformers, names[0]).from_pretrained(path, dtype=torch.float32).eval()
