"""Row reductions in one pass over the keys: lse, max, entropy, distance, linear statistics, and the output.

Flash attention's recurrence (Dao 2022, arXiv:2205.14135; Milakov and Gimelshein 2018, arXiv:1805.02867), with more sums
beside the denominator. For one block of queries, over tiles of keys, in units of ln 2:

1. s = log2(e) scale q k^T (softcap, bias, declared edit, hidden keys); m' = max(m, max_j s); a = exp2(m - m');
   t = s - m'; p = exp2(t);
2. denominator: l' = a l + sum_j p;
3. entropy: e' = a (e + l (m - m')) + sum_j p t, elementwise in float32; at the end H = ln 2 (log2 l - e / l);
4. distance: x' = a x + (i - j0) sum_j p - sum_j p (j - j0) with j0 the tile's first key: no large positions cancel;
5. linear: F' = a F + p f for the columns f (one more matrix product, n wide); output: o' = a o + p v;
6. a sink logit joins at the end (``triton_softmax``).

Tiles that every query of the block sees whole (``key_range``) skip the mask. For few queries (decoding) the rows of a
block are the queries of all heads of a key/value head, and the keys are split over programs, whose results
``triton_merge`` merges: each split is to the others what a sink is to a row.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.device import (
    FLOOR,
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
from headscope.kernels.triton.edit_arguments import argument, looks_up
from headscope.kernels.triton.edits import FAR, PAIRS, RUNS, edited
from headscope.kernels.triton.masks import key_range, row_positions, rules, visible
from headscope.kernels.triton.merge import merge_kernel
from headscope.kernels.triton.softmax import absorb, store_statistics

FEW_ROWS = 64  # up to this many queries of a key/value head share a program


class Sizes(NamedTuple):
    """The shape of a call of ``rows`` query rows; ``width`` columns of features are kept, of a tile's.

    ``repeat`` examples of the mask in a row (spans of keys) read the queries, keys and values of one.
    """

    heads: int
    group: int
    rows: int
    keys: int
    width: int = 0
    repeat: int = 1


class Rows(NamedTuple):
    """Row results (batch, head, row, ·), float32 but for the output; None where not wanted.

    ``within`` is no result: the lse of all the keys that there are, of which the output is to be that of a part.
    """

    lse: Tensor | None = None
    max: Tensor | None = None
    entropy: Tensor | None = None
    distance: Tensor | None = None
    linear: Tensor | None = None
    output: Tensor | None = None
    within: Tensor | None = None


@triton.jit
def _kernel(
    q,
    k,
    v,
    f,
    sinks,
    results,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    dv: tl.constexpr,
    DV: tl.constexpr,
    NF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    PACK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under causal masks the last blocks are the longest: first
    r = block * BM + tl.arange(0, BM)
    kv_heads = sizes.heads // sizes.group
    if PACK:
        b, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
        i, exists = r % sizes.rows, r < sizes.rows * sizes.group
        h = tl.where(exists, kv * sizes.group + r // sizes.rows, 0)
        bias_head = h[:, None]
        batches = tl.num_programs(1) // kv_heads
        first, last = row_positions(0, rules), row_positions(sizes.rows - 1, rules)
    else:
        b, kv = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads // sizes.group
        bias_head = tl.program_id(1) % sizes.heads
        i, h, exists = r, r * 0 + bias_head, r < sizes.rows
        batches = tl.num_programs(1) // sizes.heads
        first = row_positions(block * BM, rules)
        last = row_positions(tl.minimum(block * BM + BM, sizes.rows) - 1, rules)
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), kv.to(tl.int64)
    example = b // sizes.repeat
    e64 = example.to(tl.int64)
    position = row_positions(tl.where(exists, i, 0), rules)
    column = tl.arange(0, D)
    at = h64 * strides[0].head + i.to(tl.int64) * strides[0].position
    whole = exists[:, None] & (column < d)[None, :]
    qt = tl.load(q + e64 * strides[0].batch + at[:, None] + column[None, :], mask=whole, other=0.0)
    qt = signed(qt, score)
    if not TMA:
        k += e64 * strides[1].batch + kv64 * strides[1].head
        v += e64 * strides[2].batch + kv64 * strides[2].head
    if results.linear is not None:
        f += e64 * strides[3].batch

    lo, hi, full_lo, full_hi = key_range(first, last, b, sizes.keys, rules, BN)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, BN), tl.num_programs(2)) * BN
        lo = tl.minimum(lo + tl.program_id(2) * share, hi)
        hi = tl.minimum(hi, lo + share)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.maximum(tl.minimum(full_hi, hi // BN * BN), full_lo)
        if full_lo >= full_hi:
            full_lo, full_hi = lo, lo

    nothing = tl.zeros([BM], tl.float32)
    state = (nothing + FLOOR, nothing, nothing, nothing)  # max, denominator, entropy, distance
    plain: tl.constexpr = score.softcap is None and score.bias is None and score.edited is None
    kind: tl.constexpr = PAIRS if PACK or rules.positions is not None else RUNS
    linear = tl.zeros([BM, NF], tl.float32)
    output = tl.zeros([BM, DV], tl.float32)
    # under segments in pieces no tile is known to be whole, and that loop is left out: one that never runs, behind the
    # copy engine's fetches, crashes the ptxas of Triton 3.6
    part: tl.constexpr = 1 if rules.segments is not None else 0
    for masked in tl.static_range(part, 2):
        if masked:
            before = (full_lo - lo) // BN
            tiles = before + tl.cdiv(hi - full_hi, BN)
        else:
            before = 0
            tiles = (full_hi - full_lo) // BN
        for tile in range(0, tiles):
            if masked:
                start = tl.where(tile < before, lo + tile * BN, full_hi + (tile - before) * BN)
            else:
                start = full_lo + tile * BN
            begin = start + rules.key_offset
            step = start.to(tl.int64)
            j = tl.arange(0, BN)
            left = sizes.keys - start
            kt = key_tile(k, example, kv, start, left, strides[1].position, d, D, BN, masked == 0, TMA)
            s = tl.dot(qt, tl.trans(kt), input_precision=PARTS if D <= 128 else WHOLE)
            if not (plain and masked == 0):
                s = biased(scored(s, score), score, b, bias_head, (start + j)[None, :], sizes.keys)
                at_key = (start + j + rules.key_offset)[None, :]
                s = edited(s, score, example, bias_head, position[:, None], at_key, first, begin, kind)
            if masked:
                seen = visible(position, start + j + rules.key_offset, b, rules) & (j < left)[None, :]
                s = tl.where(seen, s, HIDDEN)
            if plain and masked == 0:
                p, a, state = absorb(s, score.scale * LOG2E, state, position, begin, results)
            else:
                p, a, state = absorb(s, 1.0, state, position, begin, results)
            if results.linear is not None:
                ft = load_rows(f + step * strides[3].position, j, strides[3].position, left, NF, NF, masked == 0)
                linear = tl.dot(p.to(ft.dtype), ft, linear * a[:, None], input_precision=PARTS if D <= 128 else WHOLE)
            if results.output is not None:
                vt = key_tile(v, example, kv, start, left, strides[2].position, dv, DV, BN, masked == 0, TMA)
                output = tl.dot(p.to(vt.dtype), vt, output * a[:, None], input_precision=PARTS if D <= 128 else WHOLE)

    split = tl.program_id(2).to(tl.int64)
    row = ((split * batches + b64) * sizes.heads + h64) * sizes.rows + i
    m, norm, e, x = state
    if score.edited is not None:
        norm, x = tl.where(m > FAR, norm, 0.0), tl.where(m > FAR, x, 0.0)  # else an edit hid all that the row saw
    inverse = store_statistics(results, row, exists, m, norm, e, x, sinks, h64)
    if score.edited is not None:
        inverse = tl.where(m > FAR, inverse, 0.0)
    if results.linear is not None:
        n = tl.arange(0, NF)
        kept = exists[:, None] & (n < sizes.width)[None, :]
        tl.store(results.linear + row[:, None] * sizes.width + n[None, :], linear * inverse[:, None], mask=kept)
    if results.output is not None:
        c = tl.arange(0, DV)
        whole = exists[:, None] & (c < dv)[None, :]
        out = (output * inverse[:, None]).to(results.output.dtype.element_ty)
        tl.store(results.output + row[:, None] * dv + c[None, :], out, mask=whole)


def rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    columns: Tensor | None,
    sinks: Tensor | None,
    *,
    sizes: Sizes,
    mask: Mask,
    positions: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    wants: frozenset[str],
    within: Tensor | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    edit: ScoreEdit | None = None,
) -> Rows:
    """The statistics ``wants``; see ``passes.rows``. ``columns`` are as ``features.encode`` gives them."""
    batch, heads, n, d = q.shape
    batch *= sizes.repeat
    d_value = 0 if v is None else v.shape[3]
    width, width_v = padded(d), 16 if v is None else padded(d_value)
    pack = n * sizes.group <= FEW_ROWS
    dtype = q.dtype if columns is None else columns.dtype  # float32 columns are multiplied as float32 scores are
    if pack:
        tiles = triton_tuning.decode_tiles(width, 1 << (n * sizes.group - 1).bit_length(), dtype)
        programs = batch * k.shape[1]
        splits = triton_tuning.key_splits(programs, sizes.keys, tiles.keys)
        grid = (1, programs, splits)
    else:
        sized = width, 0 if v is None else width_v, 0 if columns is None else 1, dtype
        if edit is None:
            tiles = triton_tuning.row_tiles(*sized)
        else:
            tiles = triton_tuning.edited_row_tiles(*sized, looks_up(edit))
        splits, grid = 1, (triton.cdiv(n, tiles.rows), batch * heads, 1)
    kept = None if columns is None else sizes.width
    results = allocate(q, v, wants | ({"lse"} if splits > 1 else set()), kept, splits, sizes.repeat)
    results = results._replace(within=within if splits == 1 else None)
    values = k if v is None else v
    f = k if columns is None else columns
    keys_at, values_at = tma(k, tiles.keys, width), tma(values, tiles.keys, width_v)
    if keys_at is None or values_at is None or not tiles.copy_engine:
        keys_at = values_at = None
        if v is not None and v.element_size() == 2 and width_v < min(64, width):
            # Triton 3.6 on Hopper: value tiles that threads fetch come out wrong where they are narrower than 64 and
            # than the keys' (d_head 33 with d_value 24; by the copy engine they are right): zeros fill them up
            width_v = min(64, width)
    narrow = 16 if columns is None else columns.shape[-1]
    launch(
        _kernel,
        grid,
        q,
        q,
        k if keys_at is None else keys_at,
        values if values_at is None else values_at,
        f,
        sinks if splits == 1 else None,
        results,
        (strides(q), strides(k), strides(values), strides(f)),
        sizes,
        rules(mask, batch, positions, ranges),
        score(scale, softcap, bias, registers=tiles.registers, edit=argument(edit, q.device, mask.right)),
        d=d,
        D=width,
        dv=d_value,
        DV=width_v,
        NF=narrow,
        BM=tiles.rows,
        BN=tiles.keys,
        TMA=keys_at is not None,
        PACK=pack,
        SPLIT=splits > 1,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits == 1:
        return first(results)
    merged = allocate(q, v, wants, kept, 1, sizes.repeat)._replace(within=within)
    count = batch * heads * n
    room = next(most for most in triton_tuning.SPLITS if splits <= most)
    options = {"dv": d_value, "DV": width_v, "NF": narrow, "SPLITS": room}
    launch(merge_kernel, (count,), q, results, merged, sinks, count, splits, sizes, **options)
    return first(merged)


def allocate(
    q: Tensor, v: Tensor | None, wants: frozenset[str] | set[str], width: int | None, splits: int, repeat: int = 1
) -> Rows:
    """Room for the results of every split of the keys: (split, batch, head, row, ·), ``width`` linear ones."""
    shape = (splits, q.shape[0] * repeat, *q.shape[1:3])

    def new(name: str, *last: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(*shape, *last, dtype=dtype, device=q.device) if name in wants else None

    return Rows(
        lse=new("lse"),
        max=new("max"),
        entropy=new("entropy"),
        distance=new("distance"),
        linear=None if width is None else new("linear", width),
        output=None if v is None else new("output", v.shape[3], dtype=torch.float32 if splits > 1 else v.dtype),
    )


def first(results: Rows) -> Rows:
    """The results of the first split."""
    return Rows(*(None if x is None else x[0] for x in results[:-1]))
