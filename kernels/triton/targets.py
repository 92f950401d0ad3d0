"""Mass on a few named keys of each query, from the lse alone (identity 3 of the design).

1. p_it = exp(s_it - lse_i) for a target t of query i, and s_it = scale q_i . k_t is one dot product.
2. Targets are gathered for a block of queries at a time, so memory does not grow with length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit

BLOCK = 1 << 24  # gathered key elements held at a time


def target_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    targets: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Mass (batch, head, row, t) on key positions ``targets`` (batch or 1, query, t); negative targets mean none.

    ``q`` (batch, head, query, d), ``k`` (batch, kv_head, key, d), ``lse`` (batch, head, row) of the query rows ``rows``
    (row,), all of them by default. A target that its query does not see has mass 0.
    """
    at = torch.arange(q.shape[2], device=q.device) if rows is None else rows
    t = targets.shape[-1]
    out = lse.new_zeros(*lse.shape, t)
    step = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * q.shape[3] * t))
    for r0 in range(0, at.numel(), step):
        block = at[r0 : r0 + step]
        norm = lse[:, :, r0 : r0 + step]
        out[:, :, r0 : r0 + step] = _block(q, k, norm, targets, block, mask, scale, softcap, bias, edit)
    return out


def _block(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    targets: Tensor,
    rows: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    edit: ScoreEdit | None,
) -> Tensor:
    batch, heads, _, d = q.shape
    kv_heads, keys, n = k.shape[1], k.shape[2], rows.numel()
    position = targets[:, rows].to(q.device)
    index = position - mask.key_offset
    seen = (position >= 0) & (index >= 0) & (index < keys)
    index = index.clamp(0, max(0, keys - 1)).expand(batch, -1, -1)
    flat = index.reshape(batch, 1, -1, 1).expand(-1, kv_heads, -1, d)
    chosen = k.gather(2, flat).to(lse.dtype).view(batch, kv_heads, 1, n, -1, d)
    queries = q[:, :, rows].to(lse.dtype).view(batch, kv_heads, -1, n, 1, d)
    s = (queries * chosen).sum(-1).reshape(batch, heads, n, -1) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    added = torch.zeros_like(s)
    if bias is not None:
        wide = bias.to(s.dtype).expand(batch, heads, -1)
        added = wide.gather(2, index.reshape(batch, 1, -1).expand(-1, heads, -1)).view_as(s)
        s = s + added
    examples, each = torch.arange(batch, device=q.device), torch.arange(heads, device=q.device)
    if edit is not None:
        at = (rows + mask.query_offset)[None, None, :, None], (index + mask.key_offset)[:, None]
        s = edit(s, examples[:, None, None, None], each[None, :, None, None], *at)
    visible = seen[:, None] & mask.pairs(rows[None, :, None], index, each) & (added > -torch.inf)
    empty = (lse == -torch.inf)[..., None]
    return torch.exp(s - lse[..., None]).masked_fill(~visible | empty, 0.0)
