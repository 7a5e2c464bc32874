"""Work shared out among the processes of one job, as `torchrun` starts them; a single process does all of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def join() -> None:
    """Join the group of processes that `torchrun` started, if it did: a command calls this that has no trainer, which
    would. What is shared out here is gathered through the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def several() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes what all of them found."""
    return not several() or torch.distributed.get_rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items, which must be the same on all."""
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()] if several() else items


def gather(found: Mapping[int, Any]) -> dict[int, Any]:
    """What all processes found, by number. All must call this."""
    if not several():
        return dict(found)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, dict(found))
    return {number: result for part in parts for number, result in part.items()}


def all_agree(flag: bool) -> bool:
    """Whether it is so on all processes. All must call this."""
    if not several():
        return flag
    flags: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, flag)
    return all(flags)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process holds a part of the model's weights only, as FSDP leaves it."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def wait() -> None:
    """Until all processes are here."""
    if several():
        torch.distributed.barrier()
