"""The output of attention that no library computes (softcap, sink logits, bias, edit) with its gradient, without a map.

A few query rows at a time against the keys that they may see, each piece by the dense definition and its pattern thrown
away: the backward pass computes it again (gradient checkpointing: Chen et al. 2016, arXiv 1604.06174), so that one
piece is held at a time in either direction. What fits into one piece is computed once and kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headscope.kernels import reference
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores

HELD, GPU_HELD = 1 << 20, 1 << 26  # scores in a piece


def attention(scores: Scores, v: Tensor) -> Tensor:
    """The output (batch, head, query, d_value) in the dtype of ``v``, differentiable in all that a call is made of."""
    batch, heads, queries, count = scores.shape
    step = max(1, (GPU_HELD if v.is_cuda else HELD) // max(1, batch * heads * count))
    if step >= queries:
        return _piece(scores, v)
    found = []
    for first in reversed(range(0, queries, step)):  # the largest first: growing ones leave the heap in pieces
        rows = slice(first, min(first + step, queries))
        keys = slice(*scores.mask.key_bounds(rows.start, rows.stop, count))
        if keys.start == keys.stop:
            found.append(v.new_zeros(batch, heads, rows.stop - rows.start, v.shape[3]))
            continue
        part, values = scores.rows(rows).keys(keys), v[:, :, keys]
        found.append(checkpoint(_piece, part, values, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(found[::-1], 2)


def _piece(scores: Scores, v: Tensor) -> Tensor:
    out = reference.attend(scores, v, request=Request()).output
    assert out is not None
    return out.to(v.dtype)
