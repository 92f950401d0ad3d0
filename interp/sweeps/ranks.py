"""The processes of a data-parallel run, as ``accelerate launch`` or ``torchrun`` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from headscope.interp.sites.huggingface.parallel import tensor_mesh

PATIENCE = timedelta(days=30)  # processes wait for each other's share of a run, not for a message


@dataclass(frozen=True, eq=False)
class Ranks:
    """This reader's number and how many there are; one of one where nothing was launched.

    A reader is a process or, where a model is under tensor parallelism, the processes that hold its heads, which read
    the same batches: one of them ``writes``. ``first`` is the one process that minds the folder.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    writes: bool = True
    first: bool = True

    def share(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank. All processes must call it; it waits for the last."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, value, group=self.group)
        return found


@contextmanager
def ranks(model: nn.Module) -> Iterator[Ranks]:
    """The processes that run this together; the process group of ``torch.distributed`` is made if there is none yet."""
    if not _launched():
        yield Ranks()
        return
    # a group of our own: gloo needs no GPU, and the launcher's may give up after minutes
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        rank, size, mesh = dist.get_rank(), dist.get_world_size(), tensor_mesh(model)
        each = 1 if mesh is None else mesh.size()  # processes of one reader have numbers in a row
        yield Ranks(rank // each, size // each, group, mesh is None or mesh.get_local_rank() == 0, rank == 0)
    finally:
        dist.destroy_process_group(group)


def device() -> str | None:
    """The device that the launcher gave this process, or None where nothing was launched."""
    if not _launched():
        return None
    from accelerate import PartialState

    return str(PartialState().device)


def leave() -> None:
    """End the process group that a launch was given; the last thing a launched program does."""
    if _launched():
        dist.destroy_process_group()


def _launched() -> bool:
    if not dist.is_available():
        return False
    if not dist.is_initialized() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import PartialState

        PartialState()
    return dist.is_initialized() and dist.get_world_size() > 1
