"""A tensor of which this process holds a part, with the shape of the whole; fetched from the others when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from headscope.interp.errors import HeadscopeError

Group = Any  # of torch.distributed, which has no public type for it


@dataclass(frozen=True)
class Shares:
    """Which places along a dimension each process holds: by rank, its runs (first, size) in the order of the places."""

    runs: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def in_order(cls, sizes: Sequence[int]) -> Shares:
        """One run a process, in the order of ranks."""
        firsts = accumulate(sizes, initial=0)
        return cls(tuple(((first, size),) for first, size in zip(firsts, sizes, strict=False)))

    @classmethod
    def paired(cls, sizes: Sequence[int]) -> Shares:
        """Two runs a process, of twice as many as processes: the first and the last, the second and the one before."""
        runs = [run for (run,) in cls.in_order(sizes).runs]
        return cls(tuple((run, runs[-1 - rank]) for rank, run in enumerate(runs[: len(runs) // 2])))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many places each process holds."""
        return tuple(sum(size for _, size in runs) for runs in self.runs)

    @property
    def count(self) -> int:
        """Places of the whole."""
        return sum(self.sizes)

    def of(self, whole: Tensor, along: int, rank: int) -> Tensor:
        """The part of ``whole`` that the process ``rank`` holds."""
        return side_by_side([whole.narrow(along, first, size) for first, size in self.runs[rank]], along)

    def together(self, parts: Sequence[Tensor], along: int) -> Tensor:
        """The whole, from what every process holds."""
        found = []
        for part, runs in zip(parts, self.runs, strict=True):
            pieces = torch.split(part, [size for _, size in runs], along)
            found += [(first, piece) for (first, size), piece in zip(runs, pieces, strict=True) if size]
        return side_by_side([piece for _, piece in sorted(found, key=lambda each: each[0])] or [parts[0]], along)


class Whole(Tensor):
    """The parts that the processes of ``group`` hold, put together along ``along``.

    Its shape, type and device are those of the whole and cost nothing. Anything that reads a number fetches the parts,
    once; every process must then read it, as all of them do that run the same program. It carries no gradient.

    Args:
        part: this process's.
        along: the dimension that is shared out.
        shares: which places along it each process holds.
        group: the processes.
        rank: this one among them.
    """

    part: Tensor
    along: int
    shares: Shares
    group: Group
    rank: int
    found: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, part: Tensor, along: int, shares: Shares, group: Group, rank: int) -> Whole:
        shape = list(part.shape)
        shape[along] = shares.count
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)
        made.part, made.along, made.shares, made.found = part, along, shares, None
        made.group, made.rank = group, rank
        whole: Whole = made
        return whole

    def fetched(self) -> Tensor:
        """The whole as a plain tensor, the same one every time."""
        if self.found is None:
            self.found = gather(self.part, self.along, self.shares, self.group)
        return self.found

    def holds(self, along: int, *runs: tuple[int, int]) -> bool:
        """Whether ``part`` is these runs of it, and nobody may have written into the whole."""
        return self.found is None and along == self.along and runs == self.shares.runs[self.rank]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def plain(x: Any) -> Any:
    """``x``, fetched where it is a ``Whole``."""
    return x.fetched() if isinstance(x, Whole) else x


def run_of(x: Tensor, along: int, first: int, size: int) -> Tensor:
    """``size`` places of ``x`` from ``first``; nothing is fetched where they are the part that this process holds."""
    if isinstance(x, Whole) and x.holds(along, (first, size)):
        return x.part
    found: Tensor = plain(x)
    return found.narrow(along, first, size)


def share_of(x: Tensor, along: int, shares: Shares, rank: int) -> Tensor:
    """What process ``rank``, this one, holds of ``x``; nothing is fetched where it holds it already."""
    if isinstance(x, Whole) and x.holds(along, *shares.runs[rank]):
        return x.part
    return shares.of(plain(x), along, rank)


def side_by_side(parts: Sequence[Tensor], along: int) -> Tensor:
    """``parts`` in a row; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), along)


def gather(part: Tensor, along: int, shares: Shares, group: Group) -> Tensor:
    """The parts of all processes of ``group`` put together along ``along``; they may differ in size there."""
    sizes, kind = shares.sizes, part.dtype
    sent = part.to(torch.uint8) if kind == torch.bool else part
    if part.shape[along] < max(sizes):
        filler = sent.new_zeros([max(sizes) - n if i == along else n for i, n in enumerate(part.shape)])
        sent = torch.cat([sent, filler], along)
    sent = _for(group, sent).contiguous()
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent, group=group)
    whole = shares.together([each.narrow(along, 0, n) for each, n in zip(parts, sizes, strict=True)], along)
    return whole.to(part.device, kind)


def require_same(group: Group, *tensors: Tensor, of: str) -> None:
    """Refuse what differs between the processes of ``group``, which all of them must ask.

    Raises:
        HeadscopeError: in every process; ``of`` names them.
    """
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64).to(tensors[0].device)[None]
    found = gather(mine, 0, Shares.in_order((1,) * dist.get_world_size(group)), group)
    if bool((found != found[:1]).any()):
        raise HeadscopeError(f"{of} were given different texts, positions or options; give all of them the same")


def over(x: Tensor, how: Any, group: Group) -> Tensor:
    """``x`` of all processes of ``group`` reduced into one, by ``how`` of ``torch.distributed.ReduceOp``."""
    sent = _for(group, x.clone(memory_format=torch.contiguous_format))
    dist.all_reduce(sent, how, group=group)
    return sent.to(x.device)


def _for(group: Group, x: Tensor) -> Tensor:
    """``x`` where the processes' backend takes it: gloo carries host memory, for processes that share one card."""
    return x.cpu() if x.is_cuda and dist.get_backend(group) == "gloo" else x
