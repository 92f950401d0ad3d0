"""Column reductions from a known lse: the mass every key receives, and the largest weight any query gives it.

1. With lse_i known, p_ij = exp(s_ij - lse_i) needs no normalisation (identity 4 of the design).
2. One program owns a block of keys and walks the queries that see it, so no two programs write the same key: no
   atomics, and the same sums on every run.
3. The tile is held keys x queries: sums and maxima over queries stay inside a thread's registers for most of the way.
4. A padded or empty query has lse = +inf here: it gives nothing.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.device import (
    HIDDEN,
    LOG2E,
    PARTS,
    WHOLE,
    biased,
    key_tile,
    launch,
    load_rows,
    padded,
    score,
    scored,
    signed,
    strides,
    tma,
)
from headscope.kernels.triton.edit_arguments import argument
from headscope.kernels.triton.edits import TURNED, edited
from headscope.kernels.triton.masks import Rules, query_range, visible


class Sizes(NamedTuple):
    """The shape of a call whose columns run over query rows ``first:stop``."""

    heads: int
    group: int
    queries: int
    first: int
    stop: int
    keys: int


@triton.jit
def _kernel(
    q,
    k,
    lse,
    key_sum,
    key_max,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    begin = tl.program_id(0) * BN
    j = begin + tl.arange(0, BN)
    if not TMA:
        q += b64 * strides[0].batch + h64 * strides[0].head
    k += b64 * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
    lse += (b64 * sizes.heads + h64) * sizes.queries
    kt = signed(load_rows(k, j, strides[1].position, sizes.keys, d, D, False), score)
    lo, hi, full_lo, full_hi = query_range(begin, BN, b, sizes.first, sizes.stop, sizes.keys, rules, BM)
    total = tl.zeros([BN], tl.float32)
    highest = tl.zeros([BN], tl.float32)
    part: tl.constexpr = 1 if rules.segments is not None else 0  # as in ``rows``
    for masked in tl.static_range(part, 2):
        if masked:
            before = (full_lo - lo) // BM
            tiles = before + tl.cdiv(hi - full_hi, BM)
        else:
            before = 0
            tiles = (full_hi - full_lo) // BM
        for tile in range(0, tiles):
            if masked:
                start = tl.where(tile < before, lo + tile * BM, full_hi + (tile - before) * BM)
            else:
                start = full_lo + tile * BM
            row = tl.arange(0, BM)
            origin = start + rules.query_offset
            position = origin + row
            step = start.to(tl.int64)
            qt = key_tile(q, b, h, start, hi - start, strides[0].position, d, D, BM, masked == 0, TMA)
            norm = tl.load(lse + step + row, mask=row < hi - start, other=float("inf"))
            norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
            if rules.start is not None:
                norm = tl.where(position >= tl.load(rules.start + b).to(tl.int32), norm, float("inf"))
            if rules.end is not None:
                norm = tl.where(position < tl.load(rules.end + b).to(tl.int32), norm, float("inf"))
            if score.edited is not None:
                norm = tl.gather(norm, row, 0)
            s = tl.dot(kt, tl.trans(qt), input_precision=PARTS if D <= 128 else WHOLE)
            if score.softcap is None and score.bias is None and score.edited is None and masked == 0:
                t = s * (score.scale * LOG2E) - norm[None, :]
            else:
                s = biased(scored(s, score), score, b, h, j[:, None], sizes.keys)
                at = begin + rules.key_offset
                s = edited(s, score, b, h, position[None, :], (j + rules.key_offset)[:, None], origin, at, TURNED)
                if masked:
                    s = tl.where(tl.trans(visible(position, j + rules.key_offset, b, rules)), s, HIDDEN)
                t = s - norm[None, :]
            p = tl.exp2(t)
            if key_sum is not None:
                total += tl.sum(p, 1)
            if key_max is not None:
                highest = tl.maximum(highest, tl.max(p, 1))
    out = (b64 * sizes.heads + h64) * sizes.keys + j
    if key_sum is not None:
        tl.store(key_sum + out, total, mask=j < sizes.keys)
    if key_max is not None:
        tl.store(key_max + out, highest, mask=j < sizes.keys)


def fill(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sums: Tensor | None,
    highest: Tensor | None,
    sizes: Sizes,
    seen: Rules,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    edit: ScoreEdit | None = None,
) -> None:
    """Fill ``sums`` and ``highest`` (batch, head, key), each where it is wanted; see ``passes.columns``."""
    batch, heads, _, d = q.shape
    if edit is None:
        tiles = triton_tuning.column_tiles(padded(d), q.dtype)
    else:
        tiles = triton_tuning.edited_column_tiles(padded(d), q.dtype)
    queries_at = tma(q, tiles.rows, padded(d)) if tiles.copy_engine else None
    launch(
        _kernel,
        (triton.cdiv(sizes.keys, tiles.keys), batch * heads),
        q,
        q if queries_at is None else queries_at,
        k,
        lse,
        sums,
        highest,
        (strides(q), strides(k)),
        sizes,
        seen,
        score(scale, softcap, bias, registers=tiles.registers, edit=argument(edit, q.device, seen.right)),
        d=d,
        D=padded(d),
        BM=tiles.rows,
        BN=tiles.keys,
        TMA=queries_at is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
