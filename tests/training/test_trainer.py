"""Training that is stopped and resumed, on a toy small enough for a step to take milliseconds."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from diffmask_fast.probes import Probe
from diffmask_fast.tasks import toy
from diffmask_fast.training import trainer as module
from diffmask_fast.training.objective import Objective
from diffmask_fast.training.trainer import (
    COMPLETE,
    fresh_probe,
    newest_checkpoint,
    optimizer_for,
    train_probe,
)

# 64 examples in batches of 16 and three epochs: 12 steps, checkpoints at 3, 6, 9 and 12, most within an epoch
SMALL = {"epochs": 3, "batch_size": 16, "warmup_steps": 2}
RECIPES = {name: replace(recipe, **SMALL) for name, recipe in toy.RECIPES.items()}
STEPS, SAVE = 12, 3


def prepared(recipe: str = "steady", masking: str = "hidden") -> tuple[toy.ToyModel, Probe, toy.Examples]:
    torch.manual_seed(0)
    model, examples = toy.ToyModel(), toy.toy_examples(64, 0)
    return model, fresh_probe(model, examples, RECIPES[recipe], masking, width=8), examples


def train(
    folder: Path, recipe: str = "steady", masking: str = "hidden", resume: bool = False, **more: int | None
) -> Objective:
    model, probe, examples = prepared(recipe, masking)
    options = {"seed": 3, "resume": resume, "save_steps": SAVE, "quiet": True, **more}
    return train_probe(model, probe, examples, RECIPES[recipe], folder, **options)


class StoppedError(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch):
    """stop_at(step): from now on a training stops in the middle of that step."""
    forward = Objective.forward

    def arrange(step: int | None) -> None:
        steps = iter(range(1, 1000))

        def counted(self: Objective, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            if next(steps) == step:
                raise StoppedError
            return forward(self, **inputs)

        monkeypatch.setattr(Objective, "forward", counted)

    return arrange


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("masking", ["input", "hidden"])
@pytest.mark.parametrize("recipe", ["steady", "published"])
@pytest.mark.parametrize("step", [5, 8, 9, 12])
def test_a_stopped_run_that_resumes_ends_in_the_same_bits(
    step: int, recipe: str, masking: str, tmp_path: Path, stop_at
) -> None:
    whole = train(tmp_path / "whole", recipe, masking)
    stop_at(step)
    with pytest.raises(StoppedError):
        train(tmp_path / "stopped", recipe, masking)
    stop_at(None)
    resumed = train(tmp_path / "stopped", recipe, masking, resume=True)
    assert same_bits(resumed.state_dict(), whole.state_dict())
    assert any(name.startswith("multipliers.") for name in whole.state_dict())
    final = [torch.load(tmp_path / run / f"checkpoint-{STEPS}" / "optimizer.pt") for run in ("whole", "stopped")]
    assert_same_tree(*final)


def assert_same_tree(one: object, other: object) -> None:
    """Two nested states, of an optimiser for instance, are equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_tree(left, right)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_lookaheads_slow_weights_are_in_the_checkpoint(tmp_path: Path) -> None:
    objective = train(tmp_path, "published")
    state = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt")
    slow = [entry["slow_params"] for entry in state["lookahead_state"].values()]
    trained = [p for group in optimizer_for(objective).param_groups for p in group["params"]]
    assert [one.shape for one in slow] == [p.shape for p in trained]


def test_training_moves_every_head_and_baseline_and_the_multipliers(tmp_path: Path) -> None:
    _, before, _ = prepared()
    objective = train(tmp_path)
    after = objective.probe.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    assert (objective.multipliers.current() != RECIPES["steady"].initial_multiplier).all()


def test_a_run_that_resumes_after_its_last_step_changes_nothing(tmp_path: Path) -> None:
    whole = train(tmp_path)
    assert same_bits(train(tmp_path, resume=True).state_dict(), whole.state_dict())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    results = []
    for i, seed in enumerate((3, 3, 4)):
        model, probe, examples = prepared()
        train_probe(model, probe, examples, RECIPES["steady"], tmp_path / str(i), seed=seed, quiet=True)
        results.append(probe.state_dict())
    assert same_bits(results[0], results[1]) and not same_bits(results[0], results[2])


def test_an_epoch_visits_every_example_once_and_no_two_epochs_in_the_same_order(tmp_path: Path) -> None:
    model, probe, examples = prepared()
    orders: list[list[int]] = []
    args = module.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=16
    )
    with module.patch(model) as patched:
        trainer = module.ProbeTrainer(Objective(patched, probe, RECIPES["steady"]), examples, args)
        for epoch in (0.0, 0.5, 1.0):
            trainer.state.epoch = epoch
            orders.append(list(trainer._get_train_sampler()))
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("budget", [1, 25, 100, 10_000])
@pytest.mark.parametrize("processes", [1, 3])
def test_batches_by_tokens_hold_the_budget_and_every_example(
    budget: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, probe, examples = prepared()
    args = module.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setattr(type(args), "world_size", processes)
    with module.patch(model) as patched:
        trainer = module.ProbeTrainer(Objective(patched, probe, RECIPES["steady"]), examples, args)
        batches = module._ByTokens(trainer, budget)
        epochs = []
        for epoch in (0.0, 0.5, 1.0):
            trainer.state.epoch = epoch
            epochs.append(list(batches))
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]
    for found in epochs:
        assert len(found) == len(batches) and len(found) % processes == 0
        assert {i for batch in found for i in batch} == set(range(64))
        if processes == 1:
            assert sum(map(len, found)) == 64
        for batch in found:
            longest = max(examples.lengths[i] for i in batch)
            assert len(batch) == 1 or longest * len(batch) <= budget


def test_a_run_by_tokens_that_stopped_resumes_to_the_same_bits(tmp_path: Path, stop_at) -> None:
    whole = train(tmp_path / "whole", tokens_per_batch=100)
    stop_at(8)
    with pytest.raises(StoppedError):
        train(tmp_path / "stopped", tokens_per_batch=100)
    stop_at(None)
    resumed = train(tmp_path / "stopped", resume=True, tokens_per_batch=100)
    assert same_bits(resumed.state_dict(), whole.state_dict())
    assert not same_bits(whole.state_dict(), train(tmp_path / "other").state_dict())


def test_a_budget_below_one_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens_per_batch is 0; expected 1 or more"):
        train(tmp_path, tokens_per_batch=0)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
import test_trainer as t
forward = t.Objective.forward
def slow(self, **inputs):
    time.sleep(0.05)
    return forward(self, **inputs)
t.Objective.forward = slow
torch.set_num_threads(1)
t.train(t.Path({folder!r}), {recipe!r})
"""


@pytest.mark.parametrize("recipe", ["steady", "published"])
def test_a_run_that_was_killed_resumes_to_the_same_bits(recipe: str, tmp_path: Path) -> None:
    killed_and_resumed(recipe, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("time", range(10))
@pytest.mark.parametrize("recipe", ["steady", "published"])
def test_a_run_that_was_killed_again_and_again(time: int, recipe: str, tmp_path: Path) -> None:
    killed_and_resumed(recipe, tmp_path)


def killed_and_resumed(recipe: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", recipe)
    folder = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder), recipe=recipe)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not (folder / f"checkpoint-{SAVE}").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    delay = random.uniform(0, 0.5)  # any step from here on, the writing of a checkpoint included
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    resumed = train(folder, recipe, resume=True)
    assert same_bits(resumed.state_dict(), whole.state_dict()), f"killed {delay} s after the first checkpoint"


def test_a_checkpoint_without_its_mark_is_passed_over(tmp_path: Path) -> None:
    whole = train(tmp_path)
    (tmp_path / f"checkpoint-{STEPS}" / COMPLETE).unlink()
    (tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS - SAVE}")
    assert same_bits(train(tmp_path, resume=True).state_dict(), whole.state_dict())


def test_a_run_without_a_whole_checkpoint_begins_anew(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    assert newest_checkpoint(tmp_path / "other") is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert same_bits(train(tmp_path / "other", resume=True).state_dict(), whole.state_dict())


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(folder, "published")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
        COMPLETE,
    ],
)
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_file_is_one_error_that_names_it(
    name: str, damage: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / f"checkpoint-{STEPS}" / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    # in the list of files the flipped bit may fall into a name
    with pytest.raises(ValueError, match=rf"{path.name} is damaged|is damaged: |is missing: ") as caught:
        train(tmp_path / "run", "published", resume=True)
    assert str(path.parent) in str(caught.value)


def test_a_missing_checkpoint_file_is_one_error_that_names_it(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / f"checkpoint-{STEPS}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing: delete the folder"):
        train(tmp_path / "run", "published", resume=True)


def test_two_checkpoints_are_kept(finished: Path) -> None:
    assert {path.name for path in finished.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


def test_a_checkpoint_holds_probe_and_multipliers_and_nothing_of_the_model(finished: Path) -> None:
    folder = finished / f"checkpoint-{STEPS}"
    _, probe, _ = prepared("published")
    names = set(load_file(folder / "model.safetensors"))
    assert names == {f"probe.{name}" for name in probe.state_dict()} | {"multipliers.value"}
    trained = [*probe.parameters(), torch.zeros(2)]
    state = torch.load(folder / "optimizer.pt")
    entries = [*state["lookahead_state"].values(), *state["base_optimizer"]["state"].values()]
    numbers = sum(value.numel() for entry in entries for name, value in entry.items() if name != "step")
    # Lookahead's slow weight, RMSprop's running mean and running square
    assert numbers == 3 * sum(value.numel() for value in trained)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, probe, examples = prepared()
    model.train()
    model.encoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_probe(model, probe, examples, RECIPES["steady"], tmp_path, quiet=True)
    assert same_bits(model.state_dict(), before)
    assert model.training and not model.encoder.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fresh_probes_baselines_are_the_mean_states_of_real_tokens() -> None:
    model, probe, examples = prepared()
    inputs = examples.collate([examples[i] for i in range(len(examples))])
    real = inputs["attention_mask"].bool()
    digits = model.embedding(inputs["input_ids"])
    asked = model.query_embedding(inputs["query"]).flatten(1).unsqueeze(1).expand(-1, digits.shape[1], -1)
    hidden = model.encoder(torch.cat([asked, digits], -1))
    for baseline, states in zip(probe.baselines, (digits, hidden), strict=True):
        # means of some 350 float32 numbers below 3, one of them summed in float64
        torch.testing.assert_close(baseline, states[real].mean(0), rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_a_fresh_input_probe_may_start_from_the_mask_tokens_embedding(tiny_bert) -> None:
    model, examples = tiny_bert(), toy.toy_examples(8, 0)
    for item in examples.inputs:
        del item["query"], item["labels"]
    probe = fresh_probe(model, examples, RECIPES["steady"], "input", mask_token=4)
    assert torch.equal(probe.baselines[0], model.get_input_embeddings().weight[4])
    assert probe.sizes == (16,) * 4 and probe.initial_bias == RECIPES["steady"].bias


@pytest.mark.parametrize("masking", ["input", "hidden"])
def test_a_standardised_probe_knows_the_states_and_starts_as_open_at_the_deepest_site(masking: str) -> None:
    torch.manual_seed(0)
    model, examples = toy.ToyModel(), toy.toy_examples(64, 0)
    recipe = replace(RECIPES["steady"], standardised=True, bias_of="product", bias=4.0)
    probe = fresh_probe(model, examples, recipe, masking)
    moments = module.state_moments(model, examples)
    for site, head in enumerate(probe.heads):
        of = [moments[0], moments[site]] if masking == "input" else [moments[site]]
        assert torch.equal(head.mean, torch.cat([one.mean for one in of]))
        stds = torch.cat([one.std for one in of])
        assert (head.spread >= stds).all() and (head.spread > 0).all()
        assert torch.equal(head.spread[stds > 0.5 * stds.max()], stds[stds > 0.5 * stds.max()])
    # P(shut) of a product of n gates is n times that of one, while both are small
    assert probe.initial_bias == pytest.approx(4.0 + math.log(2) if masking == "input" else 4.0)


def test_the_multipliers_climb_and_the_probe_descends() -> None:
    model, probe, _ = prepared("published")
    with module.patch(model) as patched:
        objective = Objective(patched, probe, RECIPES["published"])
    groups = optimizer_for(objective).param_groups
    assert [group["maximize"] for group in groups] == [False, False, True]
    assert [group["lr"] for group in groups] == [3e-4, 3e-4, 0.3]
    trained = [p for group in groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, objective.parameters()))


TWO_PROCESSES = """
import gc, sys, torch
sys.path.insert(0, {tests!r})
import test_trainer as t
from safetensors.torch import save_file
from diffmask_fast.training import objective as o
rank, folder = int(t.os.environ["RANK"]), t.Path({folder!r})
torch.set_num_threads(1)
seeds, draw = [], o.rank_seed
def noted(device):
    seeds.append(draw(device))
    return seeds[-1]
o.rank_seed = noted
whole = t.train(folder / "whole", {recipe!r})
forward, steps = t.Objective.forward, iter(range(1000))
def stopped(self, **inputs):
    if next(steps) == 4:
        raise t.StoppedError
    return forward(self, **inputs)
t.Objective.forward = stopped
try:
    t.train(folder / "stopped", {recipe!r})
except t.StoppedError:
    t.Objective.forward = forward
torch.distributed.barrier()  # the mark of the checkpoint is the first process's work
resumed = t.train(folder / "stopped", {recipe!r}, resume=True)
# The gradients of half a batch on each process are those of the batch on one. Both draw the same gates: the second
# process starts its stream where its half of the elements does, four to a step.
model, probe, examples = t.prepared("published")
order = examples.batches(16)[1]
half = slice(8 * rank, 8 * rank + 8)
length = max(examples.lengths[i] for i in order)
def gradients(numbers, offset, wrap):
    with t.module.patch(model) as patched:
        objective = t.Objective(patched, probe, t.RECIPES["published"])
        o.rank_seed = lambda device: torch.tensor([5, offset])
        objective.draw_sites = lambda count: torch.ones(count, dtype=torch.long)
        batch = examples.collate([examples[i] for i in order])
        objective.zero_grad()
        wrapped = wrap(objective)  # has to live until backward is done
        wrapped(**{{name: value[numbers] for name, value in batch.items()}})["loss"].backward()
        return {{name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}}
assert 8 * length % 4 == 0
alone = gradients(slice(0, 16), 0, lambda objective: objective)
both = gradients(half, rank * 8 * length // 4, lambda objective: torch.nn.parallel.DistributedDataParallel(
    objective, find_unused_parameters=True))
assert alone.keys() == both.keys() and len(alone) > 3
for name, value in alone.items():
    # sums over 16 examples in another order, in float32, of terms up to a hundred times their sum
    scale = value.abs().max()
    assert (both[name] - value).abs().max() <= 1e-4 * scale, (name, both[name], value)
state = {{"seeds": torch.stack(seeds)}}
for run, objective in (("whole", whole), ("resumed", resumed)):
    state |= {{run + "." + name: value.clone() for name, value in objective.state_dict().items()}}
save_file(state, folder / f"rank{{rank}}.safetensors")
# The interpreter must not end while a thread of the group still lets go of a tensor: wait, and end the group. The
# trainers, which are cycles, hold it too.
torch.distributed.barrier()
gc.collect()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["steady", "published"])
def test_two_processes_end_with_equal_probes_also_when_they_resume(recipe: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), folder=str(tmp_path), recipe=recipe))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    zero, one = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    seeds = zero.pop("seeds"), one.pop("seeds")
    assert not (seeds[0][:, 0] == seeds[1][:, 0]).any()  # different gates on each process
    assert same_bits(zero, one)
    whole = {name: value for name, value in zero.items() if name.startswith("whole.")}
    assert all(torch.equal(value, zero[name.replace("whole.", "resumed.", 1)]) for name, value in whole.items())


def test_a_recipe_that_corrupts_trains_on_corrupted_texts(tmp_path: Path) -> None:
    model, probe, examples = prepared()
    recipe = replace(RECIPES["steady"], corrupted=0.5, epochs=0.25)
    asked = train_probe(model, probe, examples, recipe, tmp_path / "asked", seed=3, quiet=True)
    model, probe, _ = prepared()
    by_hand = examples.corrupted(0.5, seed=3)
    assert by_hand.inputs != examples.inputs
    plain = replace(recipe, corrupted=0)
    same = train_probe(model, probe, by_hand, plain, tmp_path / "by_hand", seed=3, quiet=True)
    assert same_bits(asked.state_dict(), same.state_dict())
