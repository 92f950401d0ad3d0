"""The pattern a few query rows at a time, from the lse: what the plain PyTorch form of a reduction folds over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.reference import scores
from headscope.kernels.score_edits import ScoreEdit

HELD = 1 << 24  # weights held at a time


def log_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    held: int = HELD,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(first, stop, log p)`` for blocks of query rows; log p (batch, head, row, key) is -inf where hidden.

    ``q`` (batch, head, query, d), ``k`` (batch, kv_head, key, d); ``lse`` (batch, head, query). Blocks depend on the
    shapes alone, so that two calls on equal shapes go in step.
    """
    queries = q.shape[2]
    step = max(1, held // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    wide = k.to(lse.dtype)
    for r0 in range(0, queries, step):
        r1 = min(r0 + step, queries)
        here = replace(mask, query_offset=mask.query_offset + r0)
        s = scores(q[:, :, r0:r1].to(lse.dtype), wide, mask=here, scale=scale, softcap=softcap, bias=bias, edit=edit)
        norm = lse[:, :, r0:r1]
        yield r0, r1, s.sub_(norm.masked_fill(norm == -torch.inf, 0.0)[..., None])
