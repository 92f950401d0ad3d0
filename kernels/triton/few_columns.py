"""Column reductions from a known lse for few queries (decoding): every key is read once, for all heads that share it.

A program holds a block of keys of a key/value head and multiplies it with the queries of all its query heads: weights
(key, head, query), of which each head's are summed. See ``columns``, whose programs hold one head's keys.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton import tuning
from headscope.kernels.triton.columns import Sizes
from headscope.kernels.triton.device import (
    HIDDEN,
    LOG2E,
    PARTS,
    WHOLE,
    biased,
    launch,
    load_rows,
    padded,
    score,
    scored,
    signed,
    strides,
)
from headscope.kernels.triton.edit_arguments import argument
from headscope.kernels.triton.edits import PAIRS, edited
from headscope.kernels.triton.masks import Rules, visible


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
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    PADDING: tl.constexpr,
):
    kv_heads = sizes.heads // sizes.group
    b, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    b64, first_head = b.to(tl.int64), kv * sizes.group
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, HEADS * ROWS)
    i = sizes.first + r % ROWS
    exists = (r // ROWS < sizes.group) & (i < sizes.stop)
    i, h = tl.where(exists, i, 0), tl.where(exists, first_head + r // ROWS, 0)
    column = tl.arange(0, D)
    at = b64 * strides[0].batch + h.to(tl.int64) * strides[0].head + i.to(tl.int64) * strides[0].position
    qt = tl.load(q + at[:, None] + column[None, :], mask=exists[:, None] & (column < d)[None, :], other=0.0)
    k += b64 * strides[1].batch + kv.to(tl.int64) * strides[1].head
    kt = signed(load_rows(k, j, strides[1].position, sizes.keys, d, D, False), score)
    norm = tl.load(lse + (b64 * sizes.heads + h) * sizes.queries + i, mask=exists, other=float("inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    position = i + rules.query_offset
    if rules.start is not None and not PADDING:
        norm = tl.where(position >= tl.load(rules.start + b).to(tl.int32), norm, float("inf"))
    if rules.end is not None and not PADDING:
        norm = tl.where(position < tl.load(rules.end + b).to(tl.int32), norm, float("inf"))
    s = scored(tl.dot(kt, tl.trans(qt), input_precision=PARTS if D <= 128 else WHOLE), score)
    s = biased(s, score, b, h[None, :], j[:, None], sizes.keys)
    at = tl.program_id(0) * BN + rules.key_offset
    s = edited(s, score, b, h[None, :], position[None, :], (j + rules.key_offset)[:, None], 0, at, PAIRS)
    seen = tl.trans(visible(position, j + rules.key_offset, b, rules)) & (j < sizes.keys)[:, None]
    p = tl.exp2(tl.where(seen, s, HIDDEN) - norm[None, :])
    p = tl.reshape(p, [BN, HEADS, ROWS])
    head = tl.arange(0, HEADS)
    out = (b64 * sizes.heads + first_head + head.to(tl.int64))[None, :] * sizes.keys + j[:, None]
    kept = (head < sizes.group)[None, :] & (j < sizes.keys)[:, None]
    if key_sum is not None:
        tl.store(key_sum + out, tl.sum(p, 2), mask=kept)
    if key_max is not None:
        tl.store(key_max + out, tl.max(p, 2), mask=kept)


def takes(sizes: Sizes) -> bool:
    """Whether the queries of the heads of a key/value head fit one tile."""
    heads, rows = _shape(sizes)
    return 0 < sizes.stop - sizes.first and heads * rows <= tuning.MOST_OF_ONE


def _shape(sizes: Sizes) -> tuple[int, int]:
    """Heads and queries of each, powers of two: together at least what a matrix instruction takes."""
    heads, rows = (1 << (n - 1).bit_length() for n in (sizes.group, max(1, sizes.stop - sizes.first)))
    return max(heads, 16 // rows), rows


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
    padding: bool = False,
) -> None:
    """Fill ``sums`` and ``highest`` (batch, head, key) for a call that ``takes``; see ``passes.columns``.

    ``padding``: queries that are padding themselves count, too.
    """
    batch, _, _, d = q.shape
    heads, rows = _shape(sizes)
    tiles = tuning.few_column_tiles(padded(d), q.dtype)
    launch(
        _kernel,
        (triton.cdiv(sizes.keys, tiles.keys), batch * k.shape[1]),
        q,
        q,
        k,
        lse,
        sums,
        highest,
        (strides(q), strides(k)),
        sizes,
        seen,
        score(scale, softcap, bias, edit=argument(edit, q.device, seen.right)),
        d=d,
        D=padded(d),
        HEADS=heads,
        ROWS=rows,
        BN=tiles.keys,
        PADDING=padding,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
