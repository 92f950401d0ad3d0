"""The pattern pooled to blocks of queries x keys: a map of a head at any length.

1. With lse known, p_ij = exp(s_ij - lse_i); pooling is a sum or a maximum over i in a query block, j in a key block.
2. The heaviest key blocks of a query block are the largest entries of its row of that map; the mass that they leave out
   is the row's sum less theirs, exactly, so that "how many blocks hold 95 % of this head" is a count, not an estimate.
3. One row of blocks is held at a time when only the heaviest are kept: memory is linear in length.

Definition: ``dense``. A padded query belongs to no block (``Mask.query_is_real``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.fallback import falls_back
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import HELD, log_weights

Pool = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class TopBlocks:
    """The heaviest key blocks of every query block.

    ``mass`` (batch, head, query block, k): the share of the block's real queries' attention on each, heaviest first;
    ``index`` (same shape) int64: which key block, -1 beyond those with any mass; ``residual`` (batch, head, query
    block): the mass on all other blocks, so that mass and residual sum to the mean row mass (1 without sinks).
    """

    mass: Tensor
    index: Tensor
    residual: Tensor


def dense(p: Tensor, mask: Mask, size: int, pool: Pool = "sum") -> Tensor:
    """The definition: ``p`` (batch, head, query, key) pooled to (batch, head, query block, key block)."""
    real = mask.query_is_real(torch.arange(p.shape[2], device=p.device))
    if real is not None:
        p = p * real[:, None, :, None]
    down, across = -p.shape[2] % size, -p.shape[3] % size
    x: Tensor = torch.nn.functional.pad(p, (0, across, 0, down)).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    if pool == "max":
        return x.amax((3, 5))
    x = x.sum((3, 5))
    return x / real_queries(mask, p.shape[2], size, p.device).clamp(min=1)[..., None] if pool == "mean" else x


def real_queries(mask: Mask, queries: int, size: int, device: torch.device) -> Tensor:
    """How many real queries each query block holds: (batch or 1, 1, query block)."""
    rows = torch.arange(queries, device=device)
    real = mask.query_is_real(rows)
    real = torch.ones(1, queries, dtype=torch.bool, device=device) if real is None else real
    held: Tensor = torch.nn.functional.pad(real, (0, -queries % size)).unflatten(1, (-1, size)).sum(-1)
    return held[:, None]


def blocks(
    scores: Scores,
    *,
    size: int,
    pool: Pool = "sum",
    lse: Tensor | None = None,
    engine: attention.Engine = "auto",
) -> Tensor:
    """The pattern pooled to ``size`` x ``size`` blocks: (batch, head, query block, key block), float32.

    ``"sum"`` adds the weights up, ``"mean"`` divides by
    the block's real queries (a row of blocks then sums to 1 without sinks), ``"max"`` is the largest single weight.
    ``lse`` (batch, head, query), if known from an earlier pass, saves one. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"a block holds at least one query and key; got size {size}")
    lse = _lse(scores, engine) if lse is None else lse
    out = None
    if size >= 16 and size & (size - 1) == 0 and scores.edit is None and attention.uses_triton(engine, scores):
        from headscope.kernels.triton.blocks import pooled

        with falls_back("the streaming engine"):
            highest = pool == "max"
            out = pooled(scores.q, scores.k, lse, size=size, highest=highest, **scores.device_arguments)
    if out is None:
        out = _stream(scores, lse, size, pool)
    if pool == "mean":
        out /= real_queries(scores.mask, scores.q.shape[2], size, lse.device).clamp(min=1)[..., None]
    return out


def top_blocks(
    scores: Scores, *, size: int, top: int, engine: attention.Engine = "auto", held: int = HELD
) -> TopBlocks:
    """The ``top`` heaviest key blocks of every query block, with the exact mass of the rest; see ``TopBlocks``.

    Rows of blocks are pooled a few at a time, ``held`` numbers of the map at once.
    """
    batch, heads, queries, keys = scores.shape
    lse, across = _lse(scores, engine), -(-keys // size)
    rows = max(1, held // max(1, batch * heads * across)) * size
    parts = []
    for r0 in range(0, max(1, queries), rows):
        part = slice(r0, min(r0 + rows, queries))
        pooled = blocks(scores.rows(part), size=size, pool="mean", lse=lse[:, :, part], engine=engine)
        mass, index = pooled.topk(min(top, across), dim=-1)
        residual = pooled.scatter(-1, index, 0.0).sum(-1)
        parts.append((mass, index.masked_fill(mass <= 0, -1), residual))
    return TopBlocks(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def _lse(scores: Scores, engine: attention.Engine) -> Tensor:
    lse = attention.attend(scores, scores.k, request=Request(output=False, lse=True), engine=engine).lse
    assert lse is not None
    return lse


@torch.no_grad()
def _stream(scores: Scores, lse: Tensor, size: int, pool: Pool) -> Tensor:
    batch, heads, queries, count = scores.shape
    out = lse.new_zeros(batch, heads, -(-queries // size), -(-count // size))
    for rows, keys, log_p in log_weights(scores, lse, align=size):
        p = log_p.exp_()
        real = scores.mask.query_is_real(torch.arange(rows.start, rows.stop, device=lse.device))
        if real is not None:
            p *= real[:, None, :, None]
        p = torch.nn.functional.pad(p, (0, -p.shape[3] % size)).unflatten(3, (-1, size))
        p = p.amax(-1) if pool == "max" else p.sum(-1)
        # rows are filled up to whole blocks and folded: adding them by index would be in another order on every run
        p = torch.nn.functional.pad(p, (0, 0, rows.start % size, -rows.stop % size)).unflatten(2, (-1, size))
        p = p.amax(3) if pool == "max" else p.sum(3)
        i, j = rows.start // size, keys.start // size
        here = out[:, :, i : i + p.shape[2], j : j + p.shape[3]]
        here.copy_(torch.maximum(here, p) if pool == "max" else here + p)
    return out
