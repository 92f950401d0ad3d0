"""Mass on a few named keys of each query, from the lse alone (identity 3 of the design).

1. p_it = exp(s_it - lse_i) for a target t of query i, and s_it = scale q_i . k_t is one dot product.
2. A program holds a block of queries of one head and fetches, target by target, the key that each of them names.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton.device import (
    LOG2E,
    biased,
    last_dim_contiguous,
    launch,
    padded,
    score,
    scored,
    signed,
    strides,
)
from headscope.kernels.triton.edit_arguments import argument
from headscope.kernels.triton.edits import PAIRS, edited
from headscope.kernels.triton.masks import rules as mask_rules
from headscope.kernels.triton.masks import sees

ROWS = 32


class Sizes(NamedTuple):
    """The shape of a call of ``rows`` of the queries, with ``each`` targets.

    ``batch`` is 1 where examples have targets of their own, else 0.
    """

    heads: int
    group: int
    queries: int
    rows: int
    keys: int
    each: int
    batch: int


@triton.jit
def _kernel(
    q, k, lse, targets, rows, out, strides, sizes, rules, score, d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = r < sizes.rows
    i = r if rows is None else tl.load(rows + r, mask=exists, other=0).to(tl.int32)
    column = tl.arange(0, D)
    narrow = (column < d)[None, :]
    at = b64 * strides[0].batch + h64 * strides[0].head + i.to(tl.int64) * strides[0].position
    qt = tl.load(q + at[:, None] + column[None, :], mask=exists[:, None] & narrow, other=0.0).to(tl.float32)
    qt = signed(qt, score)
    k += b64 * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
    row = (b64 * sizes.heads + h64) * sizes.rows + r
    norm = tl.load(lse + row, mask=exists, other=0.0)
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    named = (b64 * sizes.batch * sizes.queries + i) * sizes.each
    for t in range(0, sizes.each):
        target = tl.load(targets + named + t, mask=exists, other=-1).to(tl.int64)
        index = target - rules.key_offset
        real = exists & (target >= 0) & (index >= 0) & (index < sizes.keys)
        index = tl.where(real, index, 0)
        key_at = (index * strides[1].position)[:, None] + column[None, :]
        key = tl.load(k + key_at, mask=real[:, None] & narrow, other=0.0)
        s = scored(tl.sum(qt * key.to(tl.float32), 1), score)
        j = index.to(tl.int32)
        s = biased(s, score, b, h, j, sizes.keys)
        position = j + rules.key_offset
        s = edited(s, score, b, h, i + rules.query_offset, position, 0, position, PAIRS)
        seen = real & sees(i + rules.query_offset, j + rules.key_offset, b, rules)
        tl.store(out + row * sizes.each + t, tl.where(seen, tl.exp2(s - norm), 0.0), mask=exists)


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
    (batch, heads, queries, d), count = q.shape, targets.shape[-1]
    out = lse.new_empty(*lse.shape, count)
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    q, k, lse, targets = last_dim_contiguous(q), last_dim_contiguous(k), lse.contiguous(), targets.to(q.device)
    n = lse.shape[2]
    launch(
        _kernel,
        (triton.cdiv(n, ROWS), batch * heads),
        q,
        q,
        k,
        lse,
        targets.contiguous(),
        None if rows is None else rows.contiguous(),
        out,
        (strides(q), strides(k)),
        Sizes(heads, heads // k.shape[1], queries, n, k.shape[2], count, int(targets.shape[0] > 1)),
        mask_rules(mask, batch),
        score(scale, softcap, bias, edit=argument(edit, q.device, mask.right)),
        d=d,
        D=padded(d),
        BM=ROWS,
        num_warps=4,
    )
    return out
