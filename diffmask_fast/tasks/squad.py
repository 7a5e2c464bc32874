"""Question answering on SQuAD: at which layer does the model know which words of question and passage it needs?

Input masking over all sites of any Hugging Face model with a span head (De Cao et al. 2020, section 4.3).
"""

from __future__ import annotations

import json
import os
from typing import Any

from diffmask_fast.data import Examples, TooLongError, encode, length_limit
from diffmask_fast.training.recipe import Recipe

RECIPES = {
    "steady": Recipe(),
    "published": Recipe(
        bias=5.0,
        bound=10.0,
        draw="batch",
        credit="all",
        multiplier="ascent",
        initial_multiplier=1.0,
        multiplier_rate=0.3,
        largest_multiplier=200.0,
        optimizer="lookahead-rmsprop",
        learning_rate=3e-4,
        baseline_learning_rate=1e-3,
        schedule="constant_with_warmup",
        warmup_steps=1200,
        epochs=1,
    ),
}


def read_squad(source: str | os.PathLike[str], split: str = "train") -> list[tuple[str, str]]:
    """(question, passage) pairs from a SQuAD JSON file, or from a data set of that name on the hub.

    Raises:
        FileNotFoundError: neither a file nor, with the `datasets` package, a data set of the hub.
        ValueError: JSON that isn't SQuAD; the message names the place.
    """
    if not os.path.exists(source):
        return _from_hub(str(source), split)
    try:
        with open(source, encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not JSON ({error}); expected a SQuAD file") from error
    pairs, place = [], "data"
    try:
        for i, article in enumerate(content["data"]):
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{i}].paragraphs[{j}]"
                pairs += [(qa["question"].strip(), paragraph["context"]) for qa in paragraph["qas"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is JSON but not SQuAD: at {place}: {error!r}; expected "
            '{"data": [{"paragraphs": [{"context": ..., "qas": [{"question": ...}]}]}]}'
        ) from error
    if not pairs:
        raise ValueError(f"{source} holds no question")
    return pairs


def _from_hub(name: str, split: str) -> list[tuple[str, str]]:
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{name}: there is no such file; to load a data set of that name from the hub, pip install datasets"
        ) from None
    rows = datasets.load_dataset(name, split=split)
    return list(zip((q.strip() for q in rows["question"]), rows["context"], strict=True))


def squad_examples(pairs: list[tuple[str, str]], tokenizer: Any, model: Any) -> tuple[Examples, int]:
    """The encoded pairs that fit the model, and how many do not: those are left out, so say so."""
    limit = length_limit(tokenizer, model)
    lengths = [len(ids) for ids in tokenizer([q for q, _ in pairs], [p for _, p in pairs], verbose=False)["input_ids"]]
    fitting = [pair for pair, length in zip(pairs, lengths, strict=True) if length <= limit]
    if not fitting:
        raise TooLongError(f"all {len(pairs)} questions with their passages are longer than the model's {limit} tokens")
    return encode(tokenizer, fitting, model), len(pairs) - len(fitting)


def load_model(path: str) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or a hub name, in float32.

    Raises:
        ValueError: the model has no span head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    if not any("QuestionAnswering" in name for name in config.architectures or ()):
        raise ValueError(
            f"{path} holds a {', '.join(config.architectures or ['model'])}, not a question-answering model: give one "
            "that was fine-tuned on SQuAD"
        )
    model = AutoModelForQuestionAnswering.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)
