"""Probe training on the Hugging Face Trainer: it brings the bar, the log, checkpoints, resume and `torchrun`."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from diffmask_fast import processes
from diffmask_fast.data import Examples
from diffmask_fast.masking import frozen
from diffmask_fast.moments import state_moments
from diffmask_fast.predictions import require_kind
from diffmask_fast.probes import Probe
from diffmask_fast.runs import read_json, write_json
from diffmask_fast.sites import Patched, patch
from diffmask_fast.training.backbone import checkpointed, compiled, running_in
from diffmask_fast.training.multipliers import Ascent
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.recipe import Recipe
from diffmask_fast.training.remembered import remembered_for

HOME_TEXTS = 256  # so many texts, at least, say where the states are at home
COMPLETE = "complete"  # the file that marks a checkpoint as wholly written


class ProbeTrainer(Trainer):
    """Trains the `Objective` of a probe; everything that a recipe decides is read from it."""

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        args: TrainingArguments,
        tokens_per_batch: int | None = None,
        **more: Any,
    ) -> None:
        self.objective: Objective = objective
        self.examples = examples
        self.tokens_per_batch = tokens_per_batch
        numbered = _Numbered(examples)
        super().__init__(objective, args, data_collator=numbered.collate, train_dataset=numbered, **more)
        self.model_accepts_loss_kwargs = False  # the objective hands its arguments to the frozen model
        self.add_callback(_MarkComplete())
        self.add_callback(_SetProgress(objective))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimizer_for(self.objective)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return _ByLength(self)

    def get_train_dataloader(self) -> DataLoader:
        if self.tokens_per_batch is None:
            return super().get_train_dataloader()
        batches = _ByTokens(self, self.tokens_per_batch)
        numbered: Any = self.train_dataset
        return self.accelerator.prepare(DataLoader(numbered, batch_sampler=batches, collate_fn=self.data_collator))

    def order_of_epoch(self) -> torch.Generator:
        """It follows from the seed and the epoch alone: an order drawn from the global generator could not be drawn
        again by a run that resumes within that epoch."""
        return torch.Generator().manual_seed(self.args.seed + 1_000_003 * int(self.state.epoch or 0))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **self.objective.statistics.take()} if "loss" in logs else logs, *args, **kwargs)


class _Numbered(Dataset):
    """The examples with their numbers, by which their predictions are remembered."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[int, dict[str, Any]]:
        return i, self.examples[i]

    def collate(self, batch: list[tuple[int, dict[str, Any]]]) -> dict[str, Tensor]:
        numbers, inputs = zip(*batch, strict=True)
        return {**self.examples.collate(inputs), "example": torch.tensor(numbers)}


class _ByLength(LengthGroupedSampler):
    """Similar lengths together, so that little is padded."""

    def __init__(self, trainer: ProbeTrainer) -> None:
        super().__init__(trainer.args.train_batch_size, lengths=trainer.examples.lengths)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.generator = self.trainer.order_of_epoch()
        return super().__iter__()


class _ByTokens(Sampler):
    """Batches of similar lengths with at most so many tokens, padding included; a longer text is alone in its own.

    Examples of the same length change places in each epoch, and the batches their order. Their number stays the same,
    a multiple of the number of processes: some batches come twice if need be.
    """

    batch_size, drop_last = None, False  # as accelerate asks for

    def __init__(self, trainer: ProbeTrainer, tokens: int) -> None:
        self.trainer, self.tokens = trainer, tokens

    def __len__(self) -> int:
        return len(self._batches(range(len(self.trainer.examples))))

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.trainer.order_of_epoch()
        batches = self._batches(torch.randperm(len(self.trainer.examples), generator=generator).tolist())
        return iter([batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()])

    def _batches(self, order: Sequence[int]) -> list[list[int]]:
        lengths = self.trainer.examples.lengths
        batches: list[list[int]] = []
        for i in sorted(order, key=lengths.__getitem__):  # so that the newest is the longest of its batch
            if not batches or (len(batches[-1]) + 1) * lengths[i] > self.tokens:
                batches.append([])
            batches[-1].append(i)
        missing = -len(batches) % self.trainer.args.world_size
        return [*batches, *itertools.islice(itertools.cycle(batches), missing)]


class _SetProgress(TrainerCallback):
    """Tells the objective how far it is. All that follows from the step is not saved: resume finds it again."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.objective.set_progress(state.global_step / state.max_steps)


class _MarkComplete(TrainerCallback):
    """Leaves in each checkpoint, once all processes have written it, a file with the checksums of its files."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        processes.wait()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.name != COMPLETE}
            write_json(folder / COMPLETE, sums)


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    return total


def optimizer_for(objective: Objective) -> torch.optim.Optimizer:
    """One optimiser for both players: the multipliers' group climbs (`maximize=True`)."""
    recipe, probe = objective.recipe, objective.probe
    groups: list[dict[str, Any]] = [
        {"params": list(probe.heads.parameters()), "lr": recipe.learning_rate},
        {"params": list(probe.baselines.parameters()), "lr": recipe.baseline_learning_rate},
    ]
    if isinstance(objective.multipliers, Ascent):
        groups.append({"params": [objective.multipliers.value], "lr": recipe.multiplier_rate, "maximize": True})
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, betas=(0.9, 0.98))
    from pytorch_optimizer import Lookahead

    return Lookahead(torch.optim.RMSprop(groups, centered=True), k=6, alpha=0.5)


def train_probe(
    model: nn.Module,
    probe: Probe,
    examples: Examples,
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    bf16: bool = False,
    compile: bool = False,
    checkpoint_layers: bool = False,
    tokens_per_batch: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_steps: int = 200,
    quiet: bool = False,
) -> Objective:
    """Train a probe on a frozen model.

    Args:
        model: a trained model with sites; it is moved to the device, frozen meanwhile and otherwise left as it was.
        probe: a fresh probe, see `fresh_probe`.
        examples: what to train on.
        recipe: every hyperparameter.
        output_dir: where the checkpoints go.
        seed: of everything drawn.
        bf16: run the frozen model in bfloat16; the gates stay float32.
        compile: compile the frozen model's layers with `torch.compile`, which takes about a minute on a CPU.
        checkpoint_layers: of each layer of the frozen model keep only its input for backward, and run it again then.
            Less memory, which long texts need, for a pass more; the gradients stay the same.
        tokens_per_batch: instead of the recipe's number of examples, as many of similar length as have at most so
            many tokens, padding included.
        predictions: folder in which the original predictions are remembered, by default `output_dir`; runs of the same
            model on the same texts may share one.
        resume: go on from the newest complete checkpoint in `output_dir`, to the same bits.
        save_steps: steps between checkpoints.
        quiet: no bar, no log on the terminal.

    Returns:
        The objective, with the trained probe and the multipliers.

    Raises:
        ValueError: `tokens_per_batch` below 1; a recipe that corrupts what can't be, see `Examples.corrupted`; `bf16`
            or `tokens_per_batch` for a model that is sharded (FSDP); `checkpoint_layers` where a site stands within a
            layer.
    """
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; expected 1 or more, or None")
    sharded = processes.is_sharded(model)
    if sharded and bf16:
        raise ValueError("bf16: the model's weights are shared out among processes: load it in bfloat16 before that")
    if sharded and tokens_per_batch is not None:  # with other numbers of examples they would draw other sites
        raise ValueError(
            "tokens_per_batch: the model's weights are shared out among processes, which must all run the same layers: "
            "leave it out"
        )
    args = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        learning_rate=recipe.learning_rate,
        max_grad_norm=0.0,
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=0.05,  # of all steps
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
        accelerator_config={"even_batches": tokens_per_batch is None},  # `_ByTokens` evens them itself
        disable_tqdm=quiet,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    require_kind(model, examples.kind)
    if recipe.corrupted:
        examples = examples.corrupted(recipe.corrupted, seed)
    if args.n_gpu > 1:
        args._n_gpu = 1  # more than one take `torchrun`: threads in one process would share the model's hooks
    model.to(args.device)
    newest = newest_checkpoint(output_dir) if resume else None
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(running_in(model, torch.bfloat16 if bf16 else None))
        patched = stack.enter_context(patch(model))
        remembered = remembered_for(patched, model, examples, predictions or output_dir)
        if not quiet and args.process_index == 0:
            where = f"in {remembered.path} ({remembered.nbytes / 1e6:.1f} MB)" if remembered else "nowhere"
            print(f"original predictions are remembered {where}")
        if compile:
            stack.enter_context(compiled(patched.layers))
        if checkpoint_layers:
            refuse_inner_sites(model, patched)
            stack.enter_context(checkpointed(patched.layers))
        objective = Objective(patched, probe, recipe, remembered, together=sharded, kind=examples.kind)
        trainer = ProbeTrainer(objective, examples, args, tokens_per_batch)
        if quiet:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        state = read_json(Path(newest) / "trainer_state.json") if newest else {}
        if newest and state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(newest)  # `train` would take one step more
        else:
            trainer.train(resume_from_checkpoint=newest)
        trainer.objective.set_progress(1.0)
        return trainer.objective


def refuse_inner_sites(model: nn.Module, patched: Patched) -> None:
    """Refuse sites within a layer: what stands there in a step would not stand there when the layer runs again."""
    within = {part for layer in patched.layers for part in layer.modules() if part is not layer}
    for site in patched.sites:
        if model.get_submodule(site.module) in within:
            raise ValueError(f"checkpoint_layers: the site {site} stands within a layer: leave the option out")


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The last checkpoint that was written whole, or None; one cut off by a crash is passed over.

    Raises:
        ValueError: a file of that checkpoint is not as it was written.
    """
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-[0-9]*/{COMPLETE}")]
    if not whole:
        return None
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]))
    sums = read_json(newest / COMPLETE)
    if not isinstance(sums, dict):
        raise ValueError(f"{newest / COMPLETE} is damaged: delete the folder {newest}")
    for name, total in sums.items():
        path = newest / name
        if not path.is_file() or _checksum(path) != total:
            raise ValueError(
                f"{path} is {'damaged' if path.exists() else 'missing'}: delete the folder {newest}, and the run "
                "resumes from the checkpoint before it, or begins anew if there is none"
            )
    return str(newest)


@torch.no_grad()
def fresh_probe(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    masking: str,
    *,
    width: int | None = None,
    mask_token: int | None = None,
) -> Probe:
    """An untrained probe for a model: one head per site, baselines where the model is at home.

    Args:
        model: the model to explain.
        examples: some texts for it, for the widths and the mean states.
        recipe: gives the heads' bias and bound.
        masking: "input" or "hidden".
        width: hidden width of the heads.
        mask_token: id of the mask token; its word embedding starts the input baseline. Without it, and for hidden
            masking, a baseline starts at the mean state over real tokens.
    """
    moments = state_moments(model, examples.select(range(0, len(examples), max(1, len(examples) // HOME_TEXTS))))
    sizes = [len(moments[site].mean) for site in range(len(moments))]
    bias = recipe.bias
    if masking == "input" and recipe.bias_of == "product":
        bias += math.log(len(sizes))  # so many gates, each as often shut as exp(-bias), multiply at the deepest site
    probe = Probe(sizes, masking, width=width, bound=recipe.bound, bias=bias, standardised=recipe.standardised)
    if recipe.standardised:
        for site, head in enumerate(probe.heads):
            read = [moments[site]] if masking == "hidden" else [moments[0], moments[site]]
            buffers = dict(head.named_buffers())
            buffers["mean"].copy_(torch.cat([state.mean for state in read]))
            # a dimension that hardly moves says nothing, and what bfloat16 leaves of it is rounding
            buffers["spread"].copy_(torch.cat([state.std.clamp(min=0.1 * state.std.mean()) for state in read]))
    for site, baseline in enumerate(probe.baselines):
        baseline.copy_(moments[site].mean)
    if masking == "input" and mask_token is not None:
        embeddings: Any = model
        probe.baselines[0].copy_(embeddings.get_input_embeddings().weight[mask_token])
    return probe.to(next(model.parameters()).device)
