"""A tensor of which this process holds a part, with the shape of the whole; fetched from the others when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

Group = Any  # of torch.distributed, which has no public type for it


class Whole(Tensor):
    """The parts that the processes of ``group`` hold, side by side along ``along``.

    Its shape, type and device are those of the whole and cost nothing. Anything that reads a number fetches the parts,
    once; every process must then read it, as all of them do that run the same program. It carries no gradient.

    Args:
        part: this process's.
        along: the dimension that is shared out.
        sizes: of every process's part along it, by rank.
        group: the processes.
        rank: this one among them.
    """

    part: Tensor
    along: int
    sizes: tuple[int, ...]
    group: Group
    rank: int
    found: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, part: Tensor, along: int, sizes: Sequence[int], group: Group, rank: int) -> Whole:
        shape = list(part.shape)
        shape[along] = sum(sizes)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)
        made.part, made.along, made.sizes, made.found = part, along, tuple(sizes), None
        made.group, made.rank = group, rank
        whole: Whole = made
        return whole

    def fetched(self) -> Tensor:
        """The whole as a plain tensor, the same one every time."""
        if self.found is None:
            self.found = gather(self.part, self.along, self.sizes, self.group)
        return self.found

    def holds(self, along: int, first: int, size: int) -> bool:
        """Whether ``part`` is this run of it, and nobody may have written into the whole."""
        mine = sum(self.sizes[: self.rank]), self.sizes[self.rank]
        return self.found is None and along == self.along and (first, size) == mine

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def plain(x: Any) -> Any:
    """``x``, fetched where it is a ``Whole``."""
    return x.fetched() if isinstance(x, Whole) else x


def run_of(x: Tensor, along: int, first: int, size: int) -> Tensor:
    """``size`` places of ``x`` from ``first``; nothing is fetched where they are the part that this process holds."""
    if isinstance(x, Whole) and x.holds(along, first, size):
        return x.part
    found: Tensor = plain(x)
    return found.narrow(along, first, size)


def gather(part: Tensor, along: int, sizes: Sequence[int], group: Group) -> Tensor:
    """The parts of all processes of ``group`` side by side along ``along``; they may differ in size there."""
    wide, kind = max(sizes), part.dtype
    sent = part.to(torch.uint8) if kind == torch.bool else part
    if part.shape[along] < wide:
        filler = sent.new_zeros([wide - n if i == along else n for i, n in enumerate(part.shape)])
        sent = torch.cat([sent, filler], along)
    sent = _for(group, sent).contiguous()
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent, group=group)
    whole = torch.cat([each.narrow(along, 0, n) for each, n in zip(parts, sizes, strict=True)], along)
    return whole.to(part.device, kind)


def over(x: Tensor, how: Any, group: Group) -> Tensor:
    """``x`` of all processes of ``group`` reduced into one, by ``how`` of ``torch.distributed.ReduceOp``."""
    sent = _for(group, x.clone(memory_format=torch.contiguous_format))
    dist.all_reduce(sent, how, group=group)
    return sent.to(x.device)


def _for(group: Group, x: Tensor) -> Tensor:
    """``x`` where the processes' backend takes it: gloo carries host memory, for processes that share one card."""
    return x.cpu() if x.is_cuda and dist.get_backend(group) == "gloo" else x
