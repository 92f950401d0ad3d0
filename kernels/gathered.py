"""Attention over a set of keys that lie scattered, as attention over those keys alone, put one after the other.

1. A pass that hides keys by a bias reads them all the same. Of a set, in the order of the positions, every query sees
   one run: as many of its first keys as stand at positions that the query sees. A table of where runs begin and end is
   all that a kernel needs, and a pass costs what the set's share of the keys costs.
2. Where the set differs from head to head, so do its keys: every head is then an example of its own.

What depends on where a key stood (distances, spans, lists of keys) is not computed here. See ``redistribute``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.masks import Mask
from headscope.kernels.request import Reduced, Request
from headscope.kernels.scores import Scores

WORTH = 0.9  # of the keys that a pass would read: gathering costs about a tenth of a pass


def gathers(scores: Scores, v: Tensor, request: Request, engine: attention.Engine) -> bool:
    """Whether a call's sets can be gathered: a kernel computes it, and the result does not ask where keys stood."""
    apart = request.linear is None and request.targets is None and not request.windows and not request.top
    plain = scores.edit is None and scores.mask.segments is None and scores.k.dtype == v.dtype
    return apart and plain and request.query_rows is None and not request.distance and _by_triton(scores, engine)


def _by_triton(scores: Scores, engine: attention.Engine) -> bool:
    return scores.q.numel() > 0 and attention.uses_triton(engine, scores)


def attend(scores: Scores, v: Tensor, chosen: Tensor, most: int, *, request: Request) -> Reduced:
    """The output, lse, max and entropy over the keys ``chosen``, bool (batch or 1, head or 1, key); no sink logit.

    ``most``: as many keys as the largest set of an example and head has. Raises NotCompiled where no kernel can be
    built.
    """
    from headscope.kernels.gpu_passes import rows

    batch, heads, queries, keys = scores.shape
    each = heads if chosen.shape[1] > 1 else 1  # heads whose sets differ
    chosen = chosen.expand(batch, each, keys)
    before = torch.nn.functional.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))  # chosen keys before every key
    place = torch.where(chosen, before[..., :-1], most).long()
    index = place.new_zeros(batch, each, most + 1)  # beyond a set: keys that no query sees
    index = index.scatter_(2, place, torch.arange(keys, device=place.device).expand_as(place))[..., :most]
    begin, end = (x.expand(batch, queries)[:, None].expand(-1, each, -1) for x in _runs(scores))
    first, last = (before.gather(2, x).flatten(0, 1).contiguous() for x in (begin, end))
    k, values = _gathered(scores.k, index, heads), _gathered(v, index, heads) if request.output else None
    q, bias = scores.q, scores.bias
    if each > 1:
        q = q.reshape(batch * heads, 1, queries, q.shape[3])
    if bias is not None:
        bias = bias.expand(batch, heads, keys).gather(2, index.expand(batch, heads, most)).view(*q.shape[:2], most)
    wants = {name for name in ("lse", "max", "entropy", "output") if getattr(request, name)}
    options: dict[str, Any] = {"mask": Mask.full(), "scale": scores.scale, "softcap": scores.softcap, "bias": bias}
    found = rows(q, k, values, wants=frozenset(wants), ranges=(first, last), **options)
    shape = (batch, heads, queries)
    output = None if found.output is None else found.output.view(*shape, -1)
    lse, highest, entropy = (None if x is None else x.view(shape) for x in (found.lse, found.max, found.entropy))
    return Reduced(output=output, lse=lse, max=highest, entropy=entropy)


def _runs(scores: Scores) -> tuple[Tensor, Tensor]:
    """Which keys ``begin : end`` every query sees, (batch or 1, query) each: a mask without segments or rule."""
    mask, (_, _, queries, keys) = scores.mask, scores.shape
    q = torch.arange(queries, device=scores.q.device)[None] + (mask.query_offset - mask.key_offset)
    begin, end = torch.zeros_like(q), torch.full_like(q, keys)
    if mask.right is not None:
        end = torch.minimum(end, q + (mask.right + 1))
    if mask.left is not None:
        begin = torch.maximum(begin, q - mask.left)
    if mask.start is not None:
        begin = torch.maximum(begin, mask.start[:, None] - mask.key_offset)
    if mask.end is not None:
        end = torch.minimum(end, mask.end[:, None] - mask.key_offset)
    if mask.chunk is not None:
        origin = 0 if mask.origin is None else mask.origin[:, None]
        first = torch.div(q + (mask.key_offset - origin), mask.chunk, rounding_mode="floor") * mask.chunk
        first = first + origin - mask.key_offset
        begin, end = torch.maximum(begin, first), torch.minimum(end, first + mask.chunk)
    end = end.clamp(0, keys)
    return torch.minimum(begin.clamp(min=0), end), end


def _gathered(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows ``index`` (batch, head or 1, n) of ``x`` (batch, kv_head, key, d): of all its heads, (batch, kv_head, n, d),
    or of every query head, (batch * head, 1, n, d)."""
    batch, kv_heads, keys, d = x.shape
    each = kv_heads if index.shape[1] == 1 else heads
    head = torch.arange(each, device=x.device) // (each // kv_heads)
    first = torch.arange(batch, device=x.device)[:, None] * kv_heads + head
    found = x.reshape(-1, d).index_select(0, (first[..., None] * keys + index).flatten())
    return found.view(batch, kv_heads, -1, d) if index.shape[1] == 1 else found.view(batch * heads, 1, -1, d)
