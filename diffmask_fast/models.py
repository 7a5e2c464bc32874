"""Load a Hugging Face model with the head that it was saved with, or give it a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    from diffmask_fast import gru

    name = (config_of(path).architectures or [""])[0]
    model_class = gru.GRUClassifier if name == gru.GRUClassifier.__name__ else getattr(transformers, name, None)
    if model_class is None or (task and task not in name):
        raise ValueError(
            f"{path} holds a {name or 'model that names no class'}; expected a "
            f"{task or 'model saved with its head'} model: give one that was fine-tuned for it"
        )
    with _reading(path):
        return model_class.from_pretrained(path, dtype=torch.float32).eval()


def config_of(path: str) -> Any:
    """The configuration of a model, without its weights. Raises as `load_for`."""
    import transformers

    from diffmask_fast import gru  # noqa: F401  so that its kind of configuration is known

    # a hub name is `name` or `owner/name`; what can only be a path must not be looked for on the hub
    if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: there is no such folder; give the folder of a model, or its name on the hub")
    with _reading(path):
        return transformers.AutoConfig.from_pretrained(path)


def new_classifier(path: str, names: Sequence[str], architecture: str = "encoder") -> Any:
    """An untrained classifier on a trained encoder, in float32. PyTorch's global generator draws what is new.

    Args:
        path: folder or hub name of the encoder, with any head or none.
        names: of the classes.
        architecture: "encoder", the whole of it with a new head, or "gru", a GRU on its word embeddings.

    Raises:
        FileNotFoundError, ValueError: as `load_for`; a model that can't be made a classifier.
    """
    import torch
    import transformers

    from diffmask_fast.gru import gru_on

    config = config_of(path)
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{path} holds a model of the type {config.model_type}, of which transformers has no sequence classifier: "
            "give an encoder, such as a BERT"
        )
    id2label = dict(enumerate(names))
    with _reading(path):
        if architecture == "gru":
            return gru_on(transformers.AutoModel.from_pretrained(path, dtype=torch.float32), id2label)
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            id2label=id2label,
            label2id={name: i for i, name in id2label.items()},
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,  # a head of another number of classes is replaced too
        )


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """One clear error for a model that is missing or damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error}): get them again") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is no model that can be loaded, here or from the hub: {reason}") from error
