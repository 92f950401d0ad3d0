"""Blockwise statistics of attention in plain PyTorch, on any device, sharing one pass with the output.

The work is cut into tiles of query rows against every key those rows may see. A tile holds its whole rows, so softmax
needs no running rescale and one QK^T serves the output, the row statistics and the column statistics:

1. s = scale q k^T, softcapped, hidden keys set to a large negative finite number (so that 0 * s stays 0);
2. m = max_j s, p = exp(s - m), l = sum_j p (+ exp(sink - m)): the pattern is p / l. Scores are held in units of
   ln 2, as exp2 is several times faster than exp on CPUs;
3. linear statistics are extra value columns: [output | F] = p [V | F] / l;
4. entropy = log(l) mass - sum_j p (s - m) / l, elementwise in float32, where mass = sum_j p / l (1 without a sink);
5. columns: key_sum += (1 / l)^T p.

Memory is one tile and the results; the tile is sized to stay in a core's cache. The definition is ``reference.attend``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.reference import pad_top
from headscope.kernels.request import Attended, Request

LOG2E = 1.0 / math.log(2.0)
HIDDEN = -1e30  # a hidden key's score: exp gives exactly 0, and 0 * HIDDEN is 0 where 0 * -inf would be NaN
CPU_TILE = 400_000  # scores in a tile: 1.6 MB in float32, measured fastest on 1 MB L2 caches
GPU_TILE = 1 << 26
FEW_ROWS = 32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    request: Request,
    tile: int | None = None,
) -> Attended:
    """Compute ``request`` for ``q`` (batch, head, query, d_head), ``k`` and ``v`` (batch, kv_head, key, ·).

    ``tile`` is the number of scores held at a time. Statistics are float32 (float64 for float64 input), whatever the
    inputs' dtype; the output has the value's dtype.
    """
    call = _Call(q, k, v, mask, scale, softcap, sinks)
    result = Attended()
    for rows, part in _passes(request, q.shape[2], q.device):
        _Pass(call, rows, part, result).run(tile or (CPU_TILE if q.device.type == "cpu" else GPU_TILE))
    if request.output and result.output is None:
        result.output = output_only(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
    if request.key_count:
        result.key_count = count_queries(mask, q, k.shape[2], request.key_queries or (0, q.shape[2]))
    return result


def output_only(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention output (batch, head, query, d_value) by PyTorch's own kernel where it has one.

    Library attention takes neither softcap nor sink logits; those go through the tiles. Any mask beyond plain causal
    is given to the library one block of query rows at a time, so that no query x key mask exists.
    """
    if softcap is not None or sinks is not None:
        call = _Call(q, k, v, mask, scale, softcap, sinks)
        result = Attended()
        _Pass(call, torch.arange(q.shape[2], device=q.device), Request(), result).run(
            CPU_TILE if q.device.type == "cpu" else GPU_TILE
        )
        assert result.output is not None
        return result.output
    gqa = q.shape[1] != k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    if mask.is_full or (mask.is_plain_causal and queries == 1 and mask.query_offset - mask.key_offset >= keys - 1):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
    if mask.is_plain_causal and mask.query_offset == mask.key_offset:
        keys = min(queries, keys)
        return F.scaled_dot_product_attention(
            q, k[:, :, :keys], v[:, :, :keys], is_causal=True, scale=scale, enable_gqa=gqa
        )
    return _masked_output(q, k, v, mask, scale)


def _masked_output(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    out = v.new_zeros(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])
    heads = torch.arange(q.shape[1], device=q.device)
    step = max(1, min(q.shape[2], (1 << 22) // max(1, k.shape[2] * q.shape[0])))
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


def count_queries(mask: Mask, q: Tensor, keys: int, rows: tuple[int, int]) -> Tensor:
    """How many real queries of rows ``first:stop`` see each key: int64 (batch or 1, head or 1, key)."""
    first, stop = rows[0] + mask.query_offset, rows[1] + mask.query_offset
    at = torch.arange(keys, device=q.device) + mask.key_offset
    if mask.chunk is None and mask.segments is None and mask.rule is None:
        lo = torch.full_like(at, first) if mask.right is None else torch.clamp(at - mask.right, min=first)
        hi = torch.full_like(at, stop) if mask.left is None else torch.clamp(at + mask.left + 1, max=stop)
        lo, hi = lo[None], hi[None]
        exists = torch.ones_like(lo, dtype=torch.bool)
        if mask.start is not None:
            lo, exists = torch.maximum(lo, mask.start[:, None]), exists & (at >= mask.start[:, None])
        if mask.end is not None:
            hi, exists = torch.minimum(hi, mask.end[:, None]), exists & (at < mask.end[:, None])
        return (torch.clamp(hi - lo, min=0) * exists)[:, None]
    heads = torch.arange(q.shape[1], device=q.device)
    total: Tensor = torch.zeros(1, 1, keys, dtype=torch.int64, device=q.device)
    step = max(1, (1 << 22) // max(1, keys))
    for r0 in range(rows[0], rows[1], step):
        block = torch.arange(r0, min(r0 + step, rows[1]), device=q.device)
        seen = mask.tile(block, torch.arange(keys, device=q.device), heads)
        seen = torch.ones(1, 1, block.numel(), keys, dtype=torch.bool, device=q.device) if seen is None else seen
        real = mask.query_is_real(block)
        total = total + (seen if real is None else seen & real[:, None, :, None]).sum(2)
    return total


def _passes(request: Request, queries: int, device: torch.device) -> Iterator[tuple[Tensor, Request]]:
    """Split a request into passes over sets of rows; one pass where rows and columns want the same rows."""
    whole = torch.arange(queries, device=device)
    rows = whole if request.query_rows is None else request.query_rows
    first, stop = request.key_queries or (0, queries)
    columns = request.key_sum or request.key_max
    together = request.query_rows is None and (first, stop) == (0, queries)
    if request.wants_rows:
        yield (
            rows,
            replace(
                request,
                output=request.output and request.query_rows is None,
                key_sum=request.key_sum and together,
                key_max=request.key_max and together,
            ),
        )
    if columns and not (request.wants_rows and together):
        output = request.output and together
        yield whole[first:stop], Request(output=output, key_sum=request.key_sum, key_max=request.key_max)


@dataclass(frozen=True, eq=False)
class _Call:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


class _Pass:
    """One sweep of tiles over a set of query rows, writing into ``result``."""

    def __init__(self, call: _Call, rows: Tensor, request: Request, result: Attended) -> None:
        self.call, self.rows, self.request, self.result = call, rows, request, result
        self._allocate()

    def _allocate(self) -> None:
        call, want, out = self.call, self.request, self.result
        batch, heads, keys = call.q.shape[0], call.q.shape[1], call.k.shape[2]
        shape = (batch, heads, self.rows.numel())

        def new(*size: int, fill: float = 0.0) -> Tensor:
            return torch.full(size, fill, dtype=call.dtype, device=call.q.device)

        if want.output:
            out.output = call.v.new_empty(*shape, call.v.shape[-1])  # every tile writes its rows
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
        if want.key_sum:
            out.key_sum = new(batch, heads, keys)
        if want.key_max:
            out.key_max = new(batch, heads, keys)

    def run(self, tile: int) -> None:
        """Sweep the tiles: whole batches of short sequences together, long ones one key/value head at a time."""
        call = self.call
        batch, kv_heads, keys = call.q.shape[0], call.k.shape[1], call.k.shape[2]
        rows = self.rows.numel()
        if not rows or not keys or not batch:
            return
        per_head = call.group * keys * min(rows, 64)
        heads_per = max(1, min(kv_heads, tile // per_head))
        batch_per = max(1, min(batch, tile // (per_head * kv_heads))) if heads_per == kv_heads else 1
        step = max(1, min(rows, tile // (batch_per * heads_per * call.group * keys)))
        buffers = [torch.empty(0, dtype=call.dtype, device=call.q.device) for _ in range(2)]
        for b0 in range(0, batch, batch_per):
            for h0 in range(0, kv_heads, heads_per):
                block = _Block(
                    self, slice(b0, min(b0 + batch_per, batch)), slice(h0, min(h0 + heads_per, kv_heads)), buffers
                )
                for r0 in range(0, rows, step):
                    block.tile(r0, min(r0 + step, rows))


class _Block:
    """The tiles of a few examples and key/value heads; keys and values are converted to the compute dtype once."""

    def __init__(self, sweep: _Pass, examples: slice, kv_heads: slice, buffers: list[Tensor]) -> None:
        call = sweep.call
        self.call, self.want, self.out, self.all_rows = call, sweep.request, sweep.result, sweep.rows
        self.examples, self.kv_heads, self.buffers = examples, kv_heads, buffers
        self.heads = slice(kv_heads.start * call.group, kv_heads.stop * call.group)
        self.nb, self.nh = examples.stop - examples.start, kv_heads.stop - kv_heads.start
        self.mask = call.mask.select_batch(examples.start, examples.stop)
        self.others = replace(self.mask, left=None, right=None)
        self.k = call.k[examples, kv_heads].to(call.dtype).flatten(0, 1)
        self.values = self._values()

    def _values(self) -> list[Tensor]:
        """What p is multiplied with, (batch x kv_head, key, ·): the columns [v | 1 | F | a slot for positions].

        One matrix for many rows; v apart for few rows (decoding), where copying it would cost as much as reading it.
        """
        want, keys = self.want, self.k.shape[1]
        extra = [self.k.new_ones(self.nb, keys, 1)]
        if want.linear is not None:
            extra.append(self._per_example(want.linear).to(self.k.dtype))
        if want.distance:
            extra.append(self.k.new_zeros(self.nb, keys, 1))
        features = torch.cat(extra, dim=-1).repeat_interleave(self.nh, dim=0)
        if not want.output:
            return [features]
        v = self.call.v[self.examples, self.kv_heads].to(self.k.dtype).flatten(0, 1)
        return [v, features] if self.all_rows.numel() < FEW_ROWS else [torch.cat([v, features], dim=-1)]

    def _per_example(self, x: Tensor) -> Tensor:
        """This block's examples of a tensor (key, n), (1, ., n) or (batch, ., n)."""
        if x.dim() == 3 and x.shape[0] > 1:
            return x[self.examples]
        return x.expand(self.nb, -1, -1)

    def tile(self, r0: int, r1: int) -> None:
        """Compute rows ``r0:r1`` of the sweep and store them."""
        rows = self.all_rows[r0:r1]
        first, last = int(rows[0]), int(rows[-1])
        lo, hi = self.mask.key_bounds(first, last + 1, self.k.shape[1])
        at = _Place(self, r0, r1)
        if lo == hi:
            if self.out.output is not None and self.want.output:
                self.out.output[at.index] = 0
            return
        s = self._scores(rows, first, last, lo, hi)  # (batch x kv_head, group x row, key)
        m = s.amax(-1, keepdim=True)
        empty = m <= HIDDEN / 2
        top, sink = self._with_sinks(m, r1 - r0)
        s.sub_(top)
        p = torch.exp2(s, out=self._buffer(1, s.shape)) if self.want.entropy else s.exp2_()
        if self.want.distance:
            base = self.mask.key_offset - self.mask.query_offset - first
            self.values[-1][:, lo:hi, -1] = torch.arange(lo + base, hi + base, device=s.device)
        sums = torch.cat([torch.bmm(p, x[:, lo:hi]) for x in self.values], dim=-1)
        d_value = self.call.v.shape[-1] if self.want.output else 0
        linear = sums[..., d_value:]
        mass = linear[..., :1]
        total = mass if sink is None else mass + sink
        inverse = (1.0 / total).masked_fill_(empty, 0.0)
        self._store_columns(p, inverse, rows, lo, hi)
        self._store_keys_of_rows(at, p, inverse, rows, first, lo, hi)
        self._store_linear(at, linear * inverse, rows, first)
        if self.want.output and self.out.output is not None:
            at.put(self.out.output, sums[..., :d_value] * inverse)
        self._store_rows(at, s, p, m, top, mass * inverse, total, inverse, empty)  # last: it overwrites s

    def _buffer(self, which: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        need = math.prod(shape)
        if self.buffers[which].numel() < need:
            self.buffers[which] = torch.empty(need, dtype=self.k.dtype, device=self.k.device)
        return self.buffers[which][:need].view(shape)

    def _scores(self, rows: Tensor, first: int, last: int, lo: int, hi: int) -> Tensor:
        call, n = self.call, rows.numel()
        q = call.q[self.examples, self.heads]
        q = q[:, :, first : last + 1] if last - first + 1 == n else q[:, :, rows]
        unit = call.scale if call.softcap is not None else call.scale * LOG2E
        q = (q.to(call.dtype) * unit).reshape(self.nb * self.nh, call.group * n, q.shape[-1])
        s = self._buffer(0, (q.shape[0], q.shape[1], hi - lo))
        torch.bmm(q, self.k[:, lo:hi].transpose(1, 2), out=s)
        if call.softcap is not None:
            s.div_(call.softcap).tanh_().mul_(call.softcap * LOG2E)
        self._hide(s.view(self.nb, self.nh, call.group, n, hi - lo), rows, first, last, lo, hi)
        return s

    def _hide(self, s: Tensor, rows: Tensor, first: int, last: int, lo: int, hi: int) -> None:
        """Set hidden keys to HIDDEN, touching for the band only the columns that some row does not see."""
        mask, shift = self.mask, self.mask.query_offset - self.mask.key_offset
        if mask.right is not None:
            c = max(lo, first + shift + mask.right + 1)
            if c < hi:
                future = torch.arange(c, hi, device=s.device)[None, :] > rows[:, None] + (shift + mask.right)
                s[..., c - lo :].masked_fill_(future, HIDDEN)
        if mask.left is not None:
            c = min(hi, last + shift - mask.left)
            if c > lo:
                past = torch.arange(lo, c, device=s.device)[None, :] < rows[:, None] + (shift - mask.left)
                s[..., : c - lo].masked_fill_(past, HIDDEN)
        if self.others.is_full:
            return
        heads = torch.arange(self.heads.start, self.heads.stop, device=s.device)
        seen = self.others.tile(rows, torch.arange(lo, hi, device=s.device), heads)
        if seen is not None:
            hidden = ~seen
            if hidden.shape[1] > 1:
                hidden = hidden.view(hidden.shape[0], self.nh, self.call.group, *hidden.shape[2:])
            else:
                hidden = hidden[:, :, None]
            s.masked_fill_(hidden, HIDDEN)

    def _with_sinks(self, m: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
        """The exponentials' shift and the sink logits' share of the denominator, (batch x kv_head, group x row, 1)."""
        if self.call.sinks is None:
            return m, None
        sinks = (self.call.sinks[self.heads].to(m.dtype) * LOG2E).view(1, self.nh, self.call.group, 1)
        sinks = sinks.expand(self.nb, -1, -1, n).reshape(m.shape)
        top = torch.maximum(m, sinks)
        return top, torch.exp2(sinks - top)

    def _store_rows(
        self,
        at: _Place,
        s: Tensor,
        p: Tensor,
        m: Tensor,
        top: Tensor,
        mass: Tensor,
        total: Tensor,
        inverse: Tensor,
        empty: Tensor,
    ) -> None:
        ln2 = 1.0 / LOG2E
        log_total = total.log() if self.want.lse or self.want.entropy else total
        if self.out.lse is not None and self.want.lse:
            at.put(self.out.lse, (top * ln2 + log_total).masked_fill(empty, -math.inf))
        if self.out.max is not None and self.want.max:
            at.put(self.out.max, (m * ln2).masked_fill(empty, -math.inf))
        if self.out.entropy is not None and self.want.entropy:
            expected = s.mul_(p).sum(-1, keepdim=True) * (inverse * ln2)
            entropy = (log_total.masked_fill(empty, 0.0) * mass - expected).clamp_(min=0.0)
            at.put(self.out.entropy, entropy.masked_fill_(empty, 0.0))

    def _store_linear(self, at: _Place, linear: Tensor, rows: Tensor, first: int) -> None:
        if self.out.linear is not None and self.want.linear is not None:
            at.put(self.out.linear, linear[..., 1 : 1 + self.want.linear.shape[-1]])
        if self.out.distance is not None and self.want.distance:
            ahead = (rows - first).to(linear.dtype).repeat(self.call.group)[None, :, None]
            at.put(self.out.distance, ahead * linear[..., :1] - linear[..., -1:])

    def _store_keys_of_rows(
        self, at: _Place, p: Tensor, inverse: Tensor, rows: Tensor, first: int, lo: int, hi: int
    ) -> None:
        want, out = self.want, self.out
        if want.windows and out.window_mass is not None and out.window_distance is not None:
            mass, distance = self._windows(p, rows, first, lo, hi)
            at.put(out.window_mass, mass * inverse)
            at.put(out.window_distance, distance * inverse)
        if want.top and out.top_mass is not None and out.top_keys is not None:
            value, index = p.topk(min(want.top, hi - lo), dim=-1)
            mass, keys = pad_top(value * inverse, index + (lo + self.mask.key_offset), want.top)
            at.put(out.top_mass, mass)
            at.put(out.top_keys, keys)
        if want.targets is not None and out.target_mass is not None:
            at.put(out.target_mass, self._targets(p, rows, lo, hi) * inverse)

    def _windows(self, p: Tensor, rows: Tensor, first: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        shift, group = self.mask.query_offset - self.mask.key_offset, self.call.group
        p = p.view(p.shape[0], group, rows.numel(), hi - lo)
        whole = p.sum(-1)
        masses, distances = [], []
        for w in self.want.windows:
            c = min(max(lo, first + shift - w + 1), hi)
            gap = (rows + shift)[:, None] - torch.arange(c, hi, device=p.device)[None, :]
            near = p[..., c - lo :]
            masses.append((near * ((gap >= 0) & (gap < w))).sum(-1))
            distances.append(w * whole + (near * torch.clamp(gap - w, max=0)).sum(-1))
        return tuple(torch.stack(x, dim=-1).flatten(1, 2) for x in (masses, distances))  # type: ignore[return-value]

    def _targets(self, p: Tensor, rows: Tensor, lo: int, hi: int) -> Tensor:
        targets = self.want.targets
        assert targets is not None
        targets = self._per_example(targets.to(p.device))[:, rows]
        at = targets - self.mask.key_offset - lo
        exists = (targets >= 0) & (at >= 0) & (at < hi - lo)
        at = at.clamp(0, hi - lo - 1)

        def spread(x: Tensor) -> Tensor:  # (batch, row, t) -> (batch x kv_head, group x row, t)
            x = x[:, None, None].expand(-1, self.nh, self.call.group, -1, -1)
            return x.reshape(self.nb * self.nh, -1, x.shape[-1])

        return p.gather(-1, spread(at)) * spread(exists)

    def _store_columns(self, p: Tensor, inverse: Tensor, rows: Tensor, lo: int, hi: int) -> None:
        want, out = self.want, self.out
        if not (want.key_sum or want.key_max):
            return
        n, group = rows.numel(), self.call.group
        weight = inverse.view(self.nb, self.nh * group, n)
        real = self.mask.query_is_real(rows)
        if real is not None:
            weight = weight * real[:, None, :]
        weight = weight.reshape(self.nb * self.nh * group, 1, n)
        p = p.view(-1, n, hi - lo)
        place = (self.examples, self.heads, slice(lo, hi))
        if want.key_sum and out.key_sum is not None:
            out.key_sum[place] += torch.bmm(weight, p).view(self.nb, self.nh * group, hi - lo)
        if want.key_max and out.key_max is not None:
            highest = (p * weight.transpose(1, 2)).amax(1).view(self.nb, self.nh * group, hi - lo)
            out.key_max[place] = torch.maximum(out.key_max[place], highest)


class _Place:
    """Where a tile's rows go in a result of shape (batch, head, row, ...)."""

    def __init__(self, block: _Block, r0: int, r1: int) -> None:
        self.index = (block.examples, block.heads, slice(r0, r1))
        self.shape = (block.nb, block.nh * block.call.group, r1 - r0)

    def put(self, result: Tensor, tile: Tensor) -> None:
        """Write ``tile`` (batch x kv_head, group x row, c) into ``result``."""
        result[self.index] = tile.reshape(*self.shape, *result.shape[3:]).to(result.dtype)
