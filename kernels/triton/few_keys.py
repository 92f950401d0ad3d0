"""Attention over a few keys, wherever they lie: for sets of which a pass would be mostly empty tiles.

1. ``few_scores``: a program holds a block of queries of one head, fetches the keys one by one and stores their scores
   and lse.
2. ``add_few``, once it is known what mass the keys have: adds exp(s - norm) v to an output that is there. Nothing is
   subtracted, so nothing cancels where the keys hold nearly all mass.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.scores import Scores
from headscope.kernels.triton.device import (
    FLOOR,
    LN2,
    LOG2E,
    WHOLE,
    biased,
    last_dim_contiguous,
    launch,
    load_rows,
    padded,
    score,
    scored,
    signed,
    strides,
)
from headscope.kernels.triton.masks import row_positions, visible
from headscope.kernels.triton.masks import rules as mask_rules

ROWS = 64


class Few(NamedTuple):
    """``which`` keys (batch or 1, head or 1, n) int32, -1 where there are fewer; ``scores`` (batch, head, query, n)
    float32 in units of ln 2, -inf where hidden; ``lse`` (batch, head, query)."""

    which: Tensor
    scores: Tensor
    lse: Tensor


class Sizes(NamedTuple):
    """The shape of a call, and by how much the index moves from an example, and a head, to the next."""

    heads: int
    group: int
    rows: int
    keys: int
    index_batch: int
    index_head: int


@triton.jit
def _indices(index, b, h, sizes, N: tl.constexpr):
    """The keys (n,) of a head, and which of them there are."""
    j = tl.load(index + b.to(tl.int64) * sizes.index_batch + h.to(tl.int64) * sizes.index_head + tl.arange(0, N))
    return tl.maximum(j, 0), j >= 0


@triton.jit
def _fetched(x, j, real, stride, d: tl.constexpr, D: tl.constexpr):
    """Rows ``j`` of a head, (n, D)."""
    column = tl.arange(0, D)
    at = j.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x + at, mask=real[:, None] & (column < d)[None, :], other=0.0)


@triton.jit
def _kernel(
    q,
    k,
    index,
    found,
    lse,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = i < sizes.rows
    q += b.to(tl.int64) * strides[0].batch + h.to(tl.int64) * strides[0].head
    k += b.to(tl.int64) * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
    j, real = _indices(index, b, h, sizes, N)
    qt = signed(load_rows(q, i, strides[0].position, sizes.rows, d, D, False), score)
    kt = _fetched(k, j, real, strides[1].position, d, D)
    s = scored(tl.dot(qt, tl.trans(kt), input_precision=WHOLE), score)
    s = biased(s, score, b, h, j[None, :], sizes.keys)
    seen = visible(row_positions(tl.where(exists, i, 0), rules), j + rules.key_offset, b, rules) & real[None, :]
    s = tl.where(seen & (s > FLOOR), s, float("-inf"))
    m = tl.max(s, 1)
    some = m > float("-inf")
    m = tl.where(some, m, 0.0)
    total = (m + tl.log2(tl.where(some, tl.sum(tl.exp2(s - m[:, None]), 1), 1.0))) * LN2
    row = (b.to(tl.int64) * sizes.heads + h) * sizes.rows + i
    tl.store(found + row[:, None] * N + tl.arange(0, N)[None, :], s, mask=exists[:, None])
    tl.store(lse + row, tl.where(some, total, float("-inf")), mask=exists)


@triton.jit
def _add_kernel(
    found,
    norm,
    share,
    v,
    index,
    out,
    strides,
    sizes,
    d: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = i < sizes.rows
    v += b.to(tl.int64) * strides.batch + (h // sizes.group).to(tl.int64) * strides.head
    j, real = _indices(index, b, h, sizes, N)
    row = (b.to(tl.int64) * sizes.heads + h) * sizes.rows + i
    column = tl.arange(0, D)
    whole = exists[:, None] & (column < d)[None, :]
    x = tl.load(out + row[:, None] * d + column[None, :], mask=whole, other=0.0).to(tl.float32)
    if share is not None:
        x *= tl.load(share + row, mask=exists, other=0.0)[:, None]
    at = row[:, None] * N + tl.arange(0, N)[None, :]
    s = tl.load(found + at, mask=exists[:, None], other=float("-inf"))
    p = tl.exp2(s - tl.load(norm + row, mask=exists, other=float("inf"))[:, None] * LOG2E)
    vt = _fetched(v, j, real, strides.position, d, D)
    x += tl.dot(p.to(vt.dtype), vt, input_precision=WHOLE)
    tl.store(out + row[:, None] * d + column[None, :], x.to(out.dtype.element_ty), mask=whole)


def few_scores(scores: Scores, chosen: Tensor, most: int) -> Few:
    """Scores of the keys ``chosen``, bool (batch or 1, head or 1, key), at most ``most`` of an example and head.

    No sink logit; no edit and no index rule. Raises NotCompiled where no kernel can be built.
    """
    (batch, heads, rows, keys), n = scores.shape, padded(most)
    place = torch.where(chosen, chosen.cumsum(-1) - 1, n)
    index = torch.full((*chosen.shape[:2], n + 1), -1, dtype=torch.int32, device=chosen.device)
    every = torch.arange(keys, dtype=torch.int32, device=chosen.device).expand_as(place)
    index = index.scatter_(2, place, every)[..., :n].contiguous()
    q, k = last_dim_contiguous(scores.q), last_dim_contiguous(scores.k)
    found = Few(index, q.new_empty(batch, heads, rows, n, dtype=torch.float32), q.new_empty(batch, heads, rows).float())
    sizes = _sizes(found, k)
    given = mask_rules(scores.mask, batch), score(scores.scale, scores.softcap, scores.bias)
    tile = {"d": q.shape[3], "D": padded(q.shape[3]), "N": n, "BM": ROWS}
    grid = (triton.cdiv(rows, ROWS), batch * heads)
    launch(_kernel, grid, q, q, k, *found, (strides(q), strides(k)), sizes, *given, **tile, num_warps=4)
    return found


def add_few(few: Few, norm: Tensor, v: Tensor, share: Tensor | None, out: Tensor) -> None:
    """``out`` (batch, head, query, d), contiguous, becomes ``share`` times it, and exp(s - norm) v of the few keys.

    ``share`` (None: 1) and ``norm`` are (batch, head, query), ``v`` (batch, kv_head, key, d) with all keys.
    """
    v, d, n = last_dim_contiguous(v), v.shape[3], few.scores.shape[3]
    share = None if share is None else share.contiguous()
    given = few.scores, norm.contiguous(), share, v, few.which, out, strides(v), _sizes(few, v)
    batch, heads, rows, _ = few.scores.shape
    grid, tile = (triton.cdiv(rows, ROWS), batch * heads), {"d": d, "D": padded(d), "N": n, "BM": ROWS}
    launch(_add_kernel, grid, out, *given, **tile, num_warps=4)


def _sizes(few: Few, x: Tensor) -> Sizes:
    heads, rows = few.scores.shape[1:3]
    moves = (0 if few.which.shape[at] == 1 else few.which.stride(at) for at in (0, 1))
    return Sizes(heads, heads // x.shape[1], rows, x.shape[2], *moves)
