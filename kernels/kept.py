"""What attention loses where a query may look at some of its keys only: exactly, and without a query x key tensor.

p is a row's pattern, S its kept keys, r = sum_S p_j / sum p_j. The restricted row is renormalised, as if the other
scores were -inf: p'_j = p_j / sum_S p for j in S, and 0 elsewhere. So

    recall      r, the share of the true mass that lies on kept keys
    error       |z - z'| / |z| of the outputs z = sum p_j v_j and z' = sum p'_j v_j
    divergence  KL(p' || p) = -log r, as p' / p is 1 / r on S (KL(p || p') is infinite once a key is dropped)

A sink logit keeps its weight: it counts in the softmax and in the divergence, and is no key of the recall.

With lse known the pattern comes tile by tile (``streaming.weights``), and one tile serves every set of keys at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import Tile, log_weights

# Which keys are kept: bool (batch or 1, head or 1, key), the same for every row, or a function of a tile (whose rows
# are numbered as the call's) to bool that broadcasts to the tile's (batch, head, row, key).
Keep = Tensor | Callable[[Tile], Tensor]


class Kept(NamedTuple):
    """What rows lose under one ``Keep``: (batch, head, row) each; NaN for a row that sees no key.

    ``kept``: of the keys that are counted, how many a row sees with it.
    """

    recall: Tensor
    error: Tensor
    divergence: Tensor
    kept: Tensor


class _Part(NamedTuple):
    """A few rows, the ``tile`` of their weights: their ``mass`` (batch, head, row) and what a sink logit takes
    (``rest``), their output z, and under each ``Keep`` the keys it shows, the mass that is kept and z - z'."""

    rows: slice
    tile: Tile
    mass: Tensor
    rest: Tensor
    z: Tensor
    each: Iterator[tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def losses(
    scores: Scores,
    v: Tensor,
    keeps: Sequence[Keep],
    *,
    queries: tuple[int, int] | None = None,
    lse: Tensor | None = None,
    counted: Tensor | None = None,
    held: int | None = None,
) -> list[Kept]:
    """The loss of the query rows ``queries = (first, stop)`` (None: all) under each of ``keeps``.

    Args:
        scores: queries, keys, and how they become scores.
        v: values (batch, kv_head, key, d_value).
        keeps: the kept keys. What a keep shows beyond what the mask shows has no effect.
        queries: rows of the call.
        lse: (batch, head, row) of those rows, a sink logit included, where it is known.
        counted: bool (batch, key), the keys that ``kept`` counts; None: all.
        held: scores in a tile.

    Raises:
        ValueError: inputs that do not belong together.
    """
    here, first, lse = _rows(scores, v, queries, lse)
    found = [Kept(*(torch.full_like(lse, torch.nan) for _ in Kept._fields)) for _ in keeps]
    for rows, tile, mass, rest, z, each in _parts(here, v, keeps, first, lse, held):
        seen = tile.log_p > -torch.inf
        counts = seen if counted is None else seen & counted[:, None, None, tile.keys]
        for (shown, kept, less), into in zip(each, found, strict=True):
            into.recall[:, :, rows] = kept / mass
            into.error[:, :, rows] = less.norm(dim=-1) / z.norm(dim=-1)
            share = torch.where(mass > 0, (kept + rest) / (mass + rest), torch.nan)
            into.divergence[:, :, rows] = -torch.log(share).clamp(max=0.0)
            into.kept[:, :, rows] = torch.where(mass > 0, (shown & counts).sum(-1).to(mass.dtype), torch.nan)
    return found


@torch.no_grad()
def differing(
    scores: Scores,
    v: Tensor,
    keeps: Sequence[Keep],
    above: float,
    *,
    queries: tuple[int, int] | None = None,
    lse: Tensor | None = None,
    held: int | None = None,
) -> list[Tensor]:
    """How many entries of z and z' differ by more than ``above`` under each of ``keeps``: (batch, head, row) each.

    Arguments and errors as in ``losses``.
    """
    here, first, lse = _rows(scores, v, queries, lse)
    found = [torch.zeros_like(lse) for _ in keeps]
    for rows, *_, each in _parts(here, v, keeps, first, lse, held):
        for (_, _, less), into in zip(each, found, strict=True):
            into[:, :, rows] = (less.abs() > above).sum(-1).to(into.dtype)
    return found


def _rows(scores: Scores, v: Tensor, queries: tuple[int, int] | None, lse: Tensor | None) -> tuple[Scores, int, Tensor]:
    """The scores of the query rows that are asked for, the first of them, and their lse."""
    scores.check(v)
    first, stop = queries or (0, scores.shape[2])
    here = scores.rows(slice(first, stop))
    if lse is None:
        lse = attention.attend(here, v, request=Request(output=False, lse=True)).lse
        assert lse is not None
    if lse.shape != here.shape[:3]:
        raise ValueError(f"lse must be (batch, head, row) {here.shape[:3]}; got {tuple(lse.shape)}")
    return here, first, lse


def _parts(
    here: Scores, v: Tensor, keeps: Sequence[Keep], first: int, lse: Tensor, held: int | None
) -> Iterator[_Part]:
    """The rows of ``here``, which begin at the call's row ``first``, a tile at a time."""
    v = v.to(lse.dtype)
    for tile in log_weights(here, lse, held=held):
        told = tile._replace(rows=slice(tile.rows.start + first, tile.rows.stop + first))
        p, own = tile.log_p.exp(), v[:, :, tile.keys]
        mass, z = p.sum(-1), _weighted(p, own)
        rest = (1.0 - mass).clamp(min=0.0) if here.sinks is not None else torch.zeros_like(mass)
        yield _Part(tile.rows, tile, mass, rest, z, _restricted(p, own, told, keeps, mass, rest, z))


def _restricted(
    p: Tensor, v: Tensor, tile: Tile, keeps: Sequence[Keep], mass: Tensor, rest: Tensor, z: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The keys that are shown, the kept mass and z - z' under each of ``keeps``, one at a time."""
    for keep in keeps:
        shown = keep[:, :, None, tile.keys] if isinstance(keep, Tensor) else keep(tile)
        kept = p * shown
        held = kept.sum(-1)
        total = torch.where(held + rest > 0, held + rest, 1.0)
        yield shown, held, z - _weighted(kept, v) / total[..., None] * (mass + rest)[..., None]


def fewest(mass: Tensor, share: float) -> Tensor:
    """How many of the heaviest keys hold ``share`` of ``mass`` (..., key): (...) in its dtype, 0 where there is none.

    A total that is reached but for rounding (8 units of it) is reached.
    """
    total = mass.sum(-1, keepdim=True)
    heaviest = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    short = (heaviest < (share - 8 * torch.finfo(mass.dtype).eps) * total).sum(-1)
    return torch.where(total[..., 0] > 0, short + 1, 0).to(mass.dtype)


def _weighted(p: Tensor, v: Tensor) -> Tensor:
    """sum_j p_j v_j: (batch, head, row, d_value) of p (batch, head, row, key) and v (batch, kv_head, key, d_value)."""
    batch, heads, rows, keys = p.shape
    grouped = p.reshape(batch, v.shape[1], heads // v.shape[1] * rows, keys)
    return torch.matmul(grouped, v).view(batch, heads, rows, v.shape[-1])
