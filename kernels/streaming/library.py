"""The attention output alone, by PyTorch's own kernels: what every statistic is timed against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.scores import Scores


def attention(scores: Scores, v: Tensor) -> Tensor:
    """The attention output (batch, head, query, d_value) of plain ``scores``; differentiable.

    Any mask beyond full and plain causal is given to the library one block of query rows at a time, so that no
    query x key mask exists. The library takes no softcap, sink logits or key bias.
    """
    q, k, mask, scale = scores.q, scores.k, scores.mask, scores.scale
    if scale <= 0:  # the library hides keys, and takes a row's maximum, before it scales
        q, scale = (-q, -scale) if scale else (q * 0.0, 1.0)
    (_, heads, queries, _), (_, kv_heads, keys, _) = q.shape, k.shape
    gqa = heads != kv_heads
    if covers(mask, queries, keys) and keys:
        if mask.is_full or (queries == 1 and mask.query_offset > mask.key_offset):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
        keys = min(queries, keys)
        return F.scaled_dot_product_attention(
            q, k[:, :, :keys], v[:, :, :keys], is_causal=True, scale=scale, enable_gqa=gqa
        )
    return _masked(q, k, v, mask, scale)


def covers(mask: Mask, queries: int, keys: int) -> bool:
    """Whether the library attends under ``mask`` in one call, without a query x key mask."""
    if mask.is_full or (mask.is_plain_causal and queries == 1 and mask.query_offset - mask.key_offset >= keys - 1):
        return True
    return mask.is_plain_causal and mask.query_offset == mask.key_offset


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    out = v.new_zeros(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    heads = torch.arange(q.shape[1], device=q.device)
    step = max(1, min(q.shape[2], (1 << 22) // max(1, k.shape[2] * q.shape[0])))
    if mask.left is not None:  # short blocks skip the keys before the window
        step = min(step, max(128, mask.left))
    for r0 in range(0, q.shape[2], step):
        r1 = min(r0 + step, q.shape[2])
        lo, hi = mask.key_bounds(r0, r1, k.shape[2])
        if lo == hi:
            continue
        rows, keys = torch.arange(r0, r1, device=q.device), torch.arange(lo, hi, device=q.device)
        seen = mask.tile(rows, keys, heads if mask.rule is not None else None)
        part = F.scaled_dot_product_attention(
            q[:, :, r0:r1], k[:, :, lo:hi], v[:, :, lo:hi], attn_mask=seen, scale=scale, enable_gqa=gqa
        )
        if seen is not None:
            part = torch.where(seen.any(-1, keepdim=True), part, part.new_zeros(()))  # libraries disagree on empty rows
        out[:, :, r0:r1] = part
    return out
