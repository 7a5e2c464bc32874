"""Text classifiers to explain: fine-tuned on a task's labels, and how often they are right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmask_fast import processes
from diffmask_fast.data import Examples


@dataclass(frozen=True)
class FineTuning:
    """How a classifier is trained: AdamW, a rate that rises over the first tenth of the steps and falls to 0."""

    epochs: float
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0 or (not value and name != "weight_decay"):
                raise ValueError(f"{name} is {value!r}; expected a number above 0")


FINE_TUNING = {"encoder": FineTuning(3, 1e-4), "gru": FineTuning(10, 1e-3)}


def fine_tune(
    model: nn.Module,
    examples: Examples,
    labels: Sequence[int],
    settings: FineTuning,
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Train a Hugging Face classifier in place, in float32. The same seed gives the same bits.

    Args:
        model: takes the examples' arguments and `labels`, and returns a `loss`.
        examples: what to train on.
        labels: class of each text; all windows of a text have its class.
        settings: every hyperparameter.
        output_dir: where the trainer may write; nothing that is needed later.
        seed: of order and dropout.
        quiet: no bar, no log on the terminal.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class ByLength(Trainer):
        """Similar lengths together, so that little is padded; another order in each epoch."""

        def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
            generator = torch.Generator().manual_seed(seed)
            return LengthGroupedSampler(settings.batch_size, lengths=examples.lengths, generator=generator)

    texts = range(len(examples)) if examples.windows is None else [window.text for window in examples.windows]
    labelled = replace(
        examples,
        inputs=[{**item, "labels": labels[i]} for item, i in zip(examples.inputs, texts, strict=True)],
        fixed=examples.fixed | {"labels"},
    )
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # of all steps
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_steps=0.05,  # of all steps
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=quiet,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    dataset: Any = labelled
    trainer = ByLength(model, args, data_collator=labelled.collate, train_dataset=dataset)
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


def save_classifier(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face model and its tokenizer into a new folder, which is there when all of it is written."""
    if processes.is_first():
        target = Path(folder)
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed meanwhile
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, target)
    processes.wait()


def classification_metrics(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """`accuracy`, and `macro_f1`: the mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur in either."""
    pairs = list(zip(truth, predicted, strict=True))
    right = [one for one, other in pairs if one == other]
    f1 = [2 * right.count(name) / (truth.count(name) + predicted.count(name)) for name in sorted({*truth, *predicted})]
    return {"accuracy": len(right) / len(pairs), "macro_f1": sum(f1) / len(f1)}
