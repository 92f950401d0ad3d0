"""The definition of every reduction: dense, short, obviously right, in float64 if asked.

Everything else in ``kernels/`` is an optimisation of this file, and its test is the difference from it. It builds the
query x key pattern, so keep it to short sequences.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores


def dense_scores(scores: Scores) -> Tensor:
    """Masked attention scores (batch, head, query, key) with ``-inf`` at invisible keys."""
    q, mask, bias = scores.q, scores.mask, scores.bias
    k = scores.k.repeat_interleave(scores.group, dim=1)
    s = scores.scale * (q @ k.transpose(-1, -2))
    if scores.softcap is not None:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if bias is not None:
        s = s + bias[:, :, None].to(s.dtype)
    if scores.edit is not None and s.numel():
        examples, heads, rows, keys = (torch.arange(n, device=s.device) for n in s.shape)
        s = scores.edit.tile(s, examples, heads, rows + mask.query_offset, keys + mask.key_offset)
    visible = dense_mask(mask, q.shape, k.shape[2], q.device)
    if bias is not None:  # a row that a bias hides whole would otherwise have no gradient
        visible = visible & (bias > -torch.inf)[:, :, None]
    return s.masked_fill(~visible, -torch.inf)


def dense_mask(mask: Mask, query_shape: torch.Size, keys: int, device: torch.device) -> Tensor:
    """The mask as bool (batch, head, query, key)."""
    batch, heads, queries, _ = query_shape
    rows, cols = torch.arange(queries, device=device), torch.arange(keys, device=device)
    shape = (batch, heads, queries, keys)
    if not queries or not keys:
        return torch.ones(shape, dtype=torch.bool, device=device)
    seen = mask.tile(rows, cols, torch.arange(heads, device=device))
    return torch.ones(shape, dtype=torch.bool, device=device) if seen is None else seen.expand(shape)


def pattern(scores: Scores) -> Tensor:
    """The attention pattern (batch, head, query, key).

    Rows sum to 1, to less than 1 with sink logits, and to 0 for a query that sees no key.
    """
    return normalise(dense_scores(scores), scores.sinks)


def normalise(s: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of scores ``s`` over keys; empty rows are 0.

    Not exp(s - lse): of two equal scores of 1e29 the lse is 1e29 itself, and both keys would have a mass of 1.
    """
    empty = (s == float("-inf")).all(-1, keepdim=True)
    whole = s.masked_fill(empty, 0.0)
    if sinks is not None:
        logit = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        whole = torch.cat([whole, logit], dim=-1)
    return torch.softmax(whole, dim=-1)[..., : s.shape[-1]].masked_fill(empty, 0.0)


def log_total(s: Tensor, sinks: Tensor | None) -> Tensor:
    """The lse of every row of scores ``s``, a sink logit included; -inf for an empty row."""
    lse = torch.logsumexp(s, dim=-1)
    if sinks is None:
        return lse
    empty = lse == float("-inf")
    return torch.logaddexp(lse, sinks.to(s.dtype)[None, :, None]).masked_fill(empty, float("-inf"))


def attend(scores: Scores, v: Tensor, *, request: Request) -> Reduced:
    """Every reduction of ``request`` from the dense pattern of ``scores`` and values ``v`` (batch, kv_head, key, ·), in
    the inputs' precision (at least float32)."""
    dtype = scores.dtype
    scores = replace(scores, q=scores.q.to(dtype), k=scores.k.to(dtype))
    s = dense_scores(scores)
    sinks = scores.sinks
    return reduce(s, normalise(s, sinks), v.to(dtype), mask=scores.mask, sinks=sinks, request=request)


def reduce(s: Tensor, p: Tensor, v: Tensor, *, mask: Mask, sinks: Tensor | None, request: Request) -> Reduced:
    """Every reduction of ``request`` from scores ``s`` and pattern ``p`` (batch, head, query, key)."""
    result = Reduced()
    if request.output:
        result.output = p @ v.repeat_interleave(p.shape[1] // v.shape[1], dim=1)
    result.columns = tuple(_columns(p, mask, want) for want in request.columns)
    rows = torch.arange(p.shape[2], device=p.device)
    if request.query_rows is not None:
        rows = request.query_rows
    _rows(result, p[:, :, rows], s[:, :, rows], rows, mask, sinks, request)
    return result


def _rows(
    result: Reduced, p: Tensor, s: Tensor, rows: Tensor, mask: Mask, sinks: Tensor | None, request: Request
) -> None:
    gap = (rows + mask.query_offset)[:, None] - (torch.arange(p.shape[-1], device=p.device) + mask.key_offset)[None, :]
    if request.lse:
        result.lse = log_total(s, sinks)
    if request.max:
        result.max = s.amax(-1)
    if request.entropy:
        result.entropy = torch.special.entr(p).sum(-1)
    if request.linear is not None:
        f = request.linear.to(p.dtype)
        result.linear = p @ (f if f.dim() == 2 else f[:, None])
    if request.distance:
        result.distance = (p * gap).sum(-1)
    if request.windows:
        inside = [p * ((gap >= 0) & (gap < w)) for w in request.windows]
        result.window_mass = torch.stack([x.sum(-1) for x in inside], dim=-1)
        clipped = [p * torch.clamp(gap, max=w) for w in request.windows]
        result.window_distance = torch.stack([x.sum(-1) for x in clipped], dim=-1)
    if request.top:
        mass, index = p.topk(min(request.top, p.shape[-1]), dim=-1)
        result.top_mass, result.top_keys = pad_top(mass, index + mask.key_offset, request.top)
    if request.targets is not None:
        at = request.targets[:, rows].to(p.device) - mask.key_offset
        at = at[:, None].expand(p.shape[0], p.shape[1], -1, -1)
        exists = (request.targets[:, rows].to(p.device)[:, None] >= 0) & (at >= 0) & (at < p.shape[-1])
        result.target_mass = p.gather(-1, at.clamp(0, p.shape[-1] - 1)) * exists


def pad_top(mass: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Fill the top-k of rows with fewer than ``k`` keys of non-zero mass: mass 0 and key -1."""
    keys = keys.masked_fill(mass <= 0, -1)
    short = k - mass.shape[-1]
    if short > 0:
        mass = torch.nn.functional.pad(mass, (0, short))
        keys = torch.nn.functional.pad(keys, (0, short), value=-1)
    return mass, keys


def _columns(p: Tensor, mask: Mask, want: Columns) -> ReducedColumns:
    first, stop = want.rows(p.shape[2])
    rows = torch.arange(first, stop, device=p.device)
    real = mask.query_is_real(rows)
    seen = dense_mask(mask, p.shape, p.shape[3], p.device)[:, :, first:stop]
    p = p[:, :, first:stop]
    if real is not None:
        p, seen = p * real[:, None, :, None], seen & real[:, None, :, None]
    most = p.amax(2) if stop > first else p.new_zeros(p.shape[0], p.shape[1], p.shape[3])
    return ReducedColumns(
        p.sum(2) if want.sum else None, most if want.max else None, seen.sum(2) if want.count else None
    )
