"""One tile of the streaming engine: a few query rows against every key they may see, reduced every way at once."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels.reference import pad_top
from headscope.kernels.request import Reduced, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.scores import Scores

LOG2E = 1.0 / math.log(2.0)
HIDDEN = -1e30  # a hidden key's score: exp gives exactly 0, and 0 * HIDDEN is 0 where 0 * -inf would be NaN
FEW_ROWS = 32
ALIGNED = 16  # columns that a product on a CPU has a multiple of: 67 cost a sixth more than 80, 3 twice what 16 do


class Block:
    """The tiles of a few examples and key/value heads; keys and values are converted to the compute dtype once."""

    def __init__(
        self,
        call: Scores,
        v: Tensor,
        rows: Tensor,
        request: Request,
        result: Reduced,
        examples: slice,
        kv_heads: slice,
        held: int,
    ) -> None:
        self.held = held
        self.call, self.v = call, v
        self.want, self.out, self.all_rows = request, result, rows
        self.examples, self.kv_heads = examples, kv_heads
        self.heads = slice(kv_heads.start * call.group, kv_heads.stop * call.group)
        self.nb, self.nh = examples.stop - examples.start, kv_heads.stop - kv_heads.start
        self.mask = call.mask.select_batch(examples.start, examples.stop)
        self.others = replace(self.mask, left=None, right=None)
        self.k = call.k[examples, kv_heads].to(call.dtype).flatten(0, 1)
        self.values = self._values()
        self.buffers = [self.k.new_empty(0) for _ in range(2)]  # scores and their exponentials, reused by every tile

    def _values(self) -> list[Tensor]:
        """What p is multiplied with, (batch x kv_head, key, ·): the columns [v | 1 | F | 0 | a slot for positions].

        One matrix for many rows; v apart for few rows (decoding), where copying it would cost as much as reading it.
        """
        want, keys = self.want, self.k.shape[1]
        extra = [self.k.new_ones(self.nb, keys, 1)]
        if want.linear is not None:
            extra.append(self._per_example(want.linear).to(self.k.dtype))
        width = sum(x.shape[-1] for x in extra) + want.distance + (self.v.shape[-1] if want.output else 0)
        if self.k.device.type == "cpu":  # libraries are slow at odd widths
            extra.append(self.k.new_zeros(self.nb, keys, -width % ALIGNED))
        if want.distance:
            extra.append(self.k.new_zeros(self.nb, keys, 1))
        features = torch.cat(extra, dim=-1).repeat_interleave(self.nh, dim=0)
        if not want.output:
            return [features]
        v = self.v[self.examples, self.kv_heads].to(self.k.dtype).flatten(0, 1)
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
        d_value = self.v.shape[-1] if self.want.output else 0
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
            # once for every tile: growing under a causal mask leaves the allocator's heap in pieces
            rows = self.nb * self.nh * self.call.group * self.all_rows.numel()
            most = max(need, min(self.held, rows * self.k.shape[1]))
            self.buffers[which] = torch.empty(most, dtype=self.k.dtype, device=self.k.device)
        buffer: Tensor = self.buffers[which][:need].view(shape)
        return buffer

    def _scores(self, rows: Tensor, first: int, last: int, lo: int, hi: int) -> Tensor:
        call, n = self.call, rows.numel()
        q = call.q[self.examples, self.heads]
        q = q[:, :, first : last + 1] if last - first + 1 == n else q[:, :, rows]
        unit = LOG2E if call.edit is None else 1.0  # an edit is told scores in nats
        factor = call.scale if call.softcap is not None else call.scale * unit
        q = (q.to(call.dtype) * factor).reshape(self.nb * self.nh, call.group * n, q.shape[-1])
        s = self._buffer(0, (q.shape[0], q.shape[1], hi - lo))
        torch.bmm(q, self.k[:, lo:hi].transpose(1, 2), out=s)
        if call.softcap is not None:
            s.div_(call.softcap).tanh_().mul_(call.softcap * unit)
        if call.bias is not None:
            bias = call.bias.to(s.dtype).clamp(min=HIDDEN) * unit
            s.view(self.nb, self.nh, call.group, n, hi - lo).add_(self._of_keys(bias)[..., lo:hi])
        if call.edit is not None:
            self._edit(call.edit, s.view(self.nb, self.nh * call.group, n, hi - lo), rows, lo)
            if call.bias is not None:  # what a bias takes away no edit brings back
                hidden = self._of_keys(call.bias == -math.inf)[..., lo:hi]
                s.view(self.nb, self.nh, call.group, n, hi - lo).masked_fill_(hidden, HIDDEN)
        self._hide(s.view(self.nb, self.nh, call.group, n, hi - lo), rows, first, last, lo, hi)
        return s

    def _edit(self, edit: ScoreEdit, s: Tensor, rows: Tensor, lo: int) -> None:
        """Apply a score edit to ``s`` (batch, head, row, key) in nats, and put it in units of ln 2."""
        device = s.device
        examples = torch.arange(self.examples.start, self.examples.stop, device=device)
        heads = torch.arange(self.heads.start, self.heads.stop, device=device)
        keys = torch.arange(lo, lo + s.shape[-1], device=device) + self.mask.key_offset
        edited = edit.tile(s, examples, heads, rows + self.mask.query_offset, keys)
        torch.mul(edited, LOG2E, out=s).clamp_(min=HIDDEN)  # an edit may hide a key by -inf

    def _of_keys(self, x: Tensor) -> Tensor:
        """This block's part (batch or 1, kv_head or 1, group or 1, 1, key) of (batch or 1, head or 1, key)."""
        if x.shape[0] > 1:
            x = x[self.examples]
        if x.shape[1] == 1:
            return x[:, :, None, None]
        return x[:, self.heads].view(-1, self.nh, self.call.group, 1, x.shape[-1])

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
        masses, distances = [], []
        for w in self.want.windows:
            c = min(max(lo, first + shift - w + 1), hi)
            gap = (rows + shift)[:, None] - torch.arange(c, hi, device=p.device)[None, :]
            near = p[..., c - lo :]
            masses.append((near * ((gap >= 0) & (gap < w))).sum(-1))
            # a sum of like signs: w * mass minus what is nearer would cancel
            distances.append(w * p[..., : c - lo].sum(-1) + (near * torch.clamp(gap, max=w)).sum(-1))
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
        if not self.want.columns:  # as in a pass for some rows alone
            return
        n, group = rows.numel(), self.call.group
        weight = inverse.view(self.nb, self.nh * group, n)
        real = self.mask.query_is_real(rows)
        if real is not None:
            weight = weight * real[:, None, :]
        place = (self.examples, self.heads, slice(lo, hi))
        for want, out in zip(self.want.columns, self.out.columns, strict=True):
            if not want.weighs:
                continue
            mine = weight
            if want.queries is not None:
                inside = (rows >= want.queries[0]) & (rows < want.queries[1])
                if not inside.any():
                    continue
                mine = weight * inside
            mine = mine.reshape(-1, 1, n)
            tile = p.view(-1, n, hi - lo)
            if out.sum is not None:
                out.sum[place] += torch.bmm(mine, tile).view(self.nb, self.nh * group, hi - lo)
            if out.max is not None:
                highest = (tile * mine.transpose(1, 2)).amax(1).view(self.nb, self.nh * group, hi - lo)
                out.max[place] = torch.maximum(out.max[place], highest)


class _Place:
    """Where a tile's rows go in a result of shape (batch, head, row, ...)."""

    def __init__(self, block: Block, r0: int, r1: int) -> None:
        self.index = (block.examples, block.heads, slice(r0, r1))
        self.shape = (block.nb, block.nh * block.call.group, r1 - r0)

    def put(self, result: Tensor, tile: Tensor) -> None:
        """Write ``tile`` (batch x kv_head, group x row, c) into ``result``."""
        result[self.index] = tile.reshape(*self.shape, *result.shape[3:]).to(result.dtype)
