"""The pattern from the lse, tile by tile: what the plain PyTorch form of a reduction folds over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.scores import Scores

HELD = 1 << 24  # weights held at a time on a GPU
CPU_HELD = 400_000  # on a CPU: a tile stays in a core's cache


class Tile(NamedTuple):
    """``log_p`` (batch, head, row, key) of query rows ``rows`` and keys ``keys``; -inf where a key is hidden."""

    rows: slice
    keys: slice
    log_p: Tensor


def log_tile(scores: Scores, lse: Tensor, rows: slice | Tensor, keys: slice) -> Tensor:
    """log p (batch, head, row, key) of rows ``rows`` and keys ``keys`` in the dtype of ``lse`` (batch, head, row),
    which is of those rows: slices with both ends, of rows also indices (n,) ascending."""
    q, k, mask, bias, edit = scores.q, scores.k, scores.mask, scores.bias, scores.edit
    batch, heads, _, d = q.shape
    at = torch.arange(rows.start, rows.stop, device=q.device) if isinstance(rows, slice) else rows
    n, m, kv_heads = at.numel(), keys.stop - keys.start, k.shape[1]
    queries = (q[:, :, rows].to(lse.dtype) * scores.scale).reshape(batch, kv_heads, heads // kv_heads * n, d)
    s = torch.matmul(queries, k[:, :, keys].to(lse.dtype).transpose(-1, -2)).view(batch, heads, n, m)
    if scores.softcap is not None:
        s.div_(scores.softcap).tanh_().mul_(scores.softcap)
    if bias is not None:
        s.add_(bias[:, :, None, keys])
    columns = torch.arange(keys.start, keys.stop, device=q.device)
    each = torch.arange(heads, device=q.device)
    if edit is not None and s.numel():
        examples = torch.arange(batch, device=q.device)
        s = edit.tile(s, examples, each, at + mask.query_offset, columns + mask.key_offset)
        if bias is not None:  # what a bias takes away no edit brings back
            s = s.masked_fill((bias == -torch.inf)[:, :, None, keys], -torch.inf)
    norm = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # an edit or a bias may hide every key
    s = torch.sub(s, norm) if edit is not None else s.sub_(norm)
    seen = mask.tile(at, columns, each) if s.numel() else None
    return s if seen is None else s.masked_fill_(~seen, -torch.inf)


def log_weights(
    scores: Scores,
    lse: Tensor,
    *,
    align: int = 1,
    beside: Mask | None = None,
    held: int | None = None,
) -> Iterator[Tile]:
    """Yield a pattern in tiles: a few query rows at a time, with the keys that they may see, in the dtype of ``lse``
    (batch, head, query).

    The first key of a tile is a multiple of ``align``. Tiles depend on the shapes and on what the mask, and one
    ``beside`` it, show: so two calls go in step.
    """
    batch, heads, queries, count = scores.shape
    held = held or (CPU_HELD if scores.q.device.type == "cpu" else HELD)
    step = max(1, held // max(1, batch * heads * count))
    wide = replace(scores, k=scores.k.to(lse.dtype))
    for first in range(0, max(1, queries), step):
        rows = slice(first, min(first + step, queries))
        seen = [x.key_bounds(rows.start, rows.stop, count) for x in (scores.mask, beside or scores.mask)]
        some = [(lo, hi) for lo, hi in seen if lo < hi] or [(0, 0)]
        keys = slice(min(lo for lo, _ in some) // align * align, max(hi for _, hi in some))
        yield Tile(rows, keys, log_tile(wide, lse[:, :, rows], rows, keys))
