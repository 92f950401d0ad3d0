"""How many queries see each key: the denominator of a mean over seeing queries. No scores are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.request import Reduced, Request
from headscope.kernels.scores import Scores


def count_queries(mask: Mask, q: Tensor, keys: int, rows: tuple[int, int]) -> Tensor:
    """How many real queries of rows ``first:stop`` see each key: int64 (batch or 1, head or 1, key)."""
    first, stop = rows[0] + mask.query_offset, rows[1] + mask.query_offset
    at = torch.arange(keys, device=q.device) + mask.key_offset
    if not keys:
        return torch.zeros(1, 1, 0, dtype=torch.int64, device=q.device)
    if mask.chunk is None and mask.segments is None and mask.rule is None:
        lo = torch.full_like(at, first) if mask.right is None else torch.clamp(at - mask.right, min=first)
        hi = torch.full_like(at, stop) if mask.left is None else torch.clamp(at + mask.left + 1, max=stop)
        lo, hi = lo[None], hi[None]
        exists = torch.ones_like(lo, dtype=torch.bool)
        if mask.start is not None:
            lo, exists = torch.maximum(lo, mask.start[:, None]), exists & (at >= mask.start[:, None])
        if mask.end is not None:
            hi, exists = torch.minimum(hi, mask.end[:, None]), exists & (at < mask.end[:, None])
        return (torch.clamp(hi - lo, min=0) * exists)[:, None]
    heads = torch.arange(q.shape[1], device=q.device)
    total: Tensor = torch.zeros(1, 1, keys, dtype=torch.int64, device=q.device)
    step = max(1, (1 << 22) // max(1, keys))
    for r0 in range(rows[0], rows[1], step):
        block = torch.arange(r0, min(r0 + step, rows[1]), device=q.device)
        seen = mask.tile(block, torch.arange(keys, device=q.device), heads)
        seen = torch.ones(1, 1, block.numel(), keys, dtype=torch.bool, device=q.device) if seen is None else seen
        real = mask.query_is_real(block)
        total = total + (seen if real is None else seen & real[:, None, :, None]).sum(2)
    return total


def count_columns(request: Request, result: Reduced, scores: Scores) -> None:
    """Write the counts that ``request`` asks for into the columns of ``result``."""
    for want, out in zip(request.columns, result.columns, strict=True):
        if want.count:
            _, _, queries, keys = scores.shape
            out.count = count_queries(scores.mask, scores.q, keys, want.rows(queries))
