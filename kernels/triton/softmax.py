"""The online softmax of the row kernels: what a tile of scores adds to a row's sums, and what they come to."""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels.triton.device import LN2, LOG2E


@triton.jit
def absorb(s, unit, state, position, begin, results):
    """Steps 1 to 4 of ``triton_rows``: (weights p, factor a of what was summed before, the new state).

    ``s`` (row, key) times ``unit`` are scores in units of ln 2; ``begin`` is the position of the tile's first key. The
    scale is folded into one multiply-add; a maximum commutes with it, for it is positive.
    """
    m, norm, e, x = state
    new = tl.maximum(m, tl.max(s, 1) * unit)
    t = s * unit - new[:, None]
    p = tl.exp2(t)
    a = tl.exp2(m - new)
    part = tl.sum(p, 1)
    if results.entropy is not None:
        e = a * (e + norm * (m - new)) + tl.sum(p * t, 1)
    if results.distance is not None:
        ahead = tl.arange(0, s.shape[1]).to(tl.float32)
        x = a * x + (position - begin).to(tl.float32) * part - tl.sum(p * ahead[None, :], 1)
    return p, a, (new, a * norm + part, e, x)


@triton.jit
def store_statistics(results, row, exists, m, norm, e, x, sinks, head):
    """Store a row's lse, max, entropy and distance; returns what linear sums and the output are multiplied by.

    A sink logit z joins here: the row keeps the mass norm / (norm + exp2(z - m)), by which every statistic is scaled;
    lse becomes lse', and the entropy mass (H + lse' - lse). A row that sees no key has lse -inf and all else 0. Where
    these keys lie ``within`` others, linear sums and the output come out as their share of what all keys give.
    """
    some = norm > 0.0
    safe = tl.where(some, norm, 1.0)
    lse = m + tl.log2(safe)
    inverse = 1.0 / safe
    entropy = tl.log2(safe) - e * inverse
    if sinks is not None:
        z = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(m, z)
        with_sink = top + tl.log2(tl.exp2(m - top) * safe + tl.exp2(z - top))
        mass = tl.exp2(lse - with_sink)
        entropy = mass * (entropy + with_sink - lse)
        inverse *= mass
        lse = with_sink
    if results.within is not None:
        whole = tl.load(results.within + row, mask=exists, other=0.0) * LOG2E
        inverse *= tl.where(some, tl.exp2(lse - whole), 0.0)
    if results.lse is not None:
        tl.store(results.lse + row, tl.where(some, lse * LN2, float("-inf")), mask=exists)
    if results.max is not None:
        tl.store(results.max + row, tl.where(some, m * LN2, float("-inf")), mask=exists)
    if results.entropy is not None:
        tl.store(results.entropy + row, tl.where(some, tl.maximum(entropy, 0.0) * LN2, 0.0), mask=exists)
    if results.distance is not None:
        tl.store(results.distance + row, x * inverse, mask=exists)
    return inverse
