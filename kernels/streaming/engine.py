"""Blockwise statistics of attention in plain PyTorch, on any device, sharing one pass with the output.

The work is cut into tiles of query rows against every key those rows may see. A tile holds its whole rows, so softmax
needs no running rescale and one QK^T serves the output, the row statistics and the column statistics:

1. s = scale q k^T, softcapped, hidden keys set to a large negative finite number (so that 0 * s stays 0);
2. m = max_j s, p = exp(s - m), l = sum_j p (+ exp(sink - m)): the pattern is p / l. Scores are held in units of
   ln 2, as exp2 is several times faster than exp on CPUs;
3. linear statistics are extra value columns: [output | F] = p [V | F] / l;
4. entropy = log(l) mass - sum_j p (s - m) / l, elementwise in float32, where mass = sum_j p / l (1 without a sink);
5. columns: sums += (1 / l)^T p, the weight of queries outside a range or of padding being 0: one pass for all ranges.

Memory is one tile and the results; the tile is sized to stay in a core's cache, by the keys that its rows see. The
definition is ``reference.attend``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels.request import Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import library, one_row
from headscope.kernels.streaming.counts import count_columns
from headscope.kernels.streaming.tiles import Block

CPU_TILE = 400_000  # scores in a tile: 1.6 MB in float32, measured fastest on 1 MB L2 caches
GPU_TILE = 1 << 26


def attend(
    scores: Scores,
    v: Tensor,
    *,
    request: Request,
    tile: int | None = None,
) -> Reduced:
    """Compute ``request`` for ``scores`` and values ``v`` (batch, kv_head, key, ·).

    ``tile`` is the number of scores held at a time. Statistics are float32 (float64 for float64 input), whatever the
    inputs' dtype; the output has the value's dtype.
    """
    q = scores.q
    tile = tile or (CPU_TILE if q.device.type == "cpu" else GPU_TILE)
    short = one_row.attend(scores, v, request, tile)
    if short is not None:
        count_columns(request, short, scores)
        return short
    result = Reduced(columns=tuple(ReducedColumns() for _ in request.columns))
    for rows, part in _passes(request, q.shape[2], q.device):
        _Pass(scores, v, rows, part, result).run(tile)
    if request.output and result.output is None:
        if scores.is_plain:
            result.output = library.attention(scores, v)
        else:
            _Pass(scores, v, torch.arange(q.shape[2], device=q.device), Request(), result).run(tile)
    count_columns(request, result, scores)
    return result


def _passes(request: Request, queries: int, device: torch.device) -> Iterator[tuple[Tensor, Request]]:
    """Split a request into passes over sets of rows; one pass where rows and columns want the same rows."""
    whole = torch.arange(queries, device=device)
    rows = whole if request.query_rows is None else request.query_rows
    ranges = [each.rows(queries) for each in request.columns if each.weighs]
    together = request.query_rows is None
    if request.wants_rows:
        columns = request.columns if together else ()
        yield rows, replace(request, output=request.output and together, columns=columns)
    if ranges and not (request.wants_rows and together):
        asked = [(whole >= first) & (whole < stop) for first, stop in ranges]
        some = torch.stack(asked).any(0).nonzero()[:, 0]
        yield some, Request(output=request.output and some.numel() == queries, columns=request.columns)


class _Pass:
    """One sweep of tiles over a set of query rows, writing into ``result``."""

    def __init__(self, call: Scores, v: Tensor, rows: Tensor, request: Request, result: Reduced) -> None:
        self.call, self.v, self.rows, self.request, self.result = call, v, rows, request, result
        self._allocate()

    def _allocate(self) -> None:
        call, want, out = self.call, self.request, self.result
        batch, heads, keys = call.q.shape[0], call.q.shape[1], call.k.shape[2]
        shape = (batch, heads, self.rows.numel())

        def new(*size: int, fill: float = 0.0) -> Tensor:
            return torch.full(size, fill, dtype=call.dtype, device=call.q.device)

        if want.output:
            out.output = self.v.new_empty(*shape, self.v.shape[-1])  # every tile writes its rows
        if want.lse:
            out.lse = new(*shape, fill=-math.inf)
        if want.max:
            out.max = new(*shape, fill=-math.inf)
        if want.entropy:
            out.entropy = new(*shape)
        if want.linear is not None:
            out.linear = new(*shape, want.linear.shape[-1])
        if want.distance:
            out.distance = new(*shape)
        if want.windows:
            out.window_mass = new(*shape, len(want.windows))
            out.window_distance = new(*shape, len(want.windows))
        if want.top:
            out.top_mass = new(*shape, want.top)
            out.top_keys = torch.full((*shape, want.top), -1, dtype=torch.int64, device=call.q.device)
        if want.targets is not None:
            out.target_mass = new(*shape, want.targets.shape[-1])
        for each, column in zip(want.columns, out.columns, strict=False):
            column.sum = new(batch, heads, keys) if each.sum else None
            column.max = new(batch, heads, keys) if each.max else None

    def run(self, tile: int) -> None:
        """Sweep the tiles: whole batches of short sequences together, long ones one key/value head at a time."""
        call = self.call
        batch, kv_heads, keys = call.q.shape[0], call.k.shape[1], call.k.shape[2]
        rows = self.rows.numel()
        if not rows or not keys or not batch:
            if self.request.output and self.result.output is not None:
                self.result.output.zero_()
            return
        per_head = call.group * keys * min(rows, 64)
        heads_per = max(1, min(kv_heads, tile // per_head))
        batch_per = max(1, min(batch, tile // (per_head * kv_heads))) if heads_per == kv_heads else 1
        step = max(1, min(rows, tile // (batch_per * heads_per * call.group * keys)))
        for b0 in range(0, batch, batch_per):
            for h0 in range(0, kv_heads, heads_per):
                examples, kv = slice(b0, min(b0 + batch_per, batch)), slice(h0, min(h0 + heads_per, kv_heads))
                block = Block(call, self.v, self.rows, self.request, self.result, examples, kv, tile)
                r0 = 0
                while r0 < rows:
                    r1 = min(r0 + step, rows)
                    if call.q.device.type == "cpu":
                        r1 = self._reach(r0, r1, tile // (batch_per * heads_per * call.group))
                    block.tile(r0, r1)
                    r0 = r1

    def _reach(self, r0: int, least: int, held: int) -> int:
        """The last row with which rows from ``r0`` see no more than ``held`` keys together, ``least`` or later: early
        rows of causal attention see few."""
        low, high = least, min(self.rows.numel(), r0 + held)
        first = int(self.rows[r0])
        while low < high:
            r1 = (low + high + 1) // 2
            lo, hi = self.call.mask.key_bounds(first, int(self.rows[r1 - 1]) + 1, self.call.k.shape[2])
            low, high = (r1, high) if (r1 - r0) * (hi - lo) <= held else (low, r1 - 1)
        return low
