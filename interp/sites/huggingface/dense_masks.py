"""Dense masks read back as rules: for sites whose own code already holds a (query, key) mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headscope.interp.sites.huggingface.masks import with_padding
from headscope.kernels.masks import Mask

ROWS = 512  # query rows compared at a time


def rule_of(visible: Tensor, *, query_offset: int = 0, key_offset: int = 0, real: Tensor | None = None) -> Mask:
    """The rule that says exactly what ``visible`` says for every query that is a token.

    Tried in order: causal, causal within a window, full, each with the padding of ``real``; where none agrees with
    every entry, the mask itself becomes the rule and is looked up tile by tile.

    Args:
        visible: bool (batch, 1 or head, query, key).
        query_offset: position of the first query row.
        key_offset: position of the first key.
        real: bool (batch, position), False where a position is padding; None where nothing is padded.
    """
    base = Mask(query_offset=query_offset, key_offset=key_offset, right=0)
    for candidate in (base, replace(base, left=_reach(visible, base, real)), replace(base, right=None)):
        candidate = candidate if real is None else with_padding(candidate, real, visible.shape[0])
        if agrees(candidate, visible):
            return candidate
    return _lookup(visible, base, real)


def agrees(mask: Mask, visible: Tensor) -> bool:
    """Whether ``mask`` equals ``visible`` (batch, 1 or head, query, key) for every query that is not padding."""
    queries, keys = visible.shape[-2:]
    columns = torch.arange(keys, device=visible.device)
    heads = torch.arange(visible.shape[1], device=visible.device)
    for first in range(0, queries, ROWS):
        rows = torch.arange(first, min(queries, first + ROWS), device=visible.device)
        tile = mask.tile(rows, columns, heads)
        differs = ~visible[:, :, rows] if tile is None else visible[:, :, rows] != tile
        kept = mask.query_is_real(rows)
        if bool((differs if kept is None else differs & kept[:, None, :, None]).any()):
            return False
    return True


def _reach(visible: Tensor, base: Mask, real: Tensor | None) -> int:
    """The largest distance from a real query back to a key that it sees."""
    queries = visible.shape[-2]
    at = torch.arange(queries, device=visible.device) + base.query_offset
    seen = visible.any(1)
    back = at - (seen.int().argmax(-1) + base.key_offset)
    kept = seen.any(-1)
    if real is not None:
        kept = kept & real[:, base.query_offset : base.query_offset + queries]
    return max(0, int(back.masked_fill(~kept, 0).max()))


def _lookup(visible: Tensor, base: Mask, real: Tensor | None) -> Mask:
    per_head = visible.shape[1] > 1

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        head = h if per_head else torch.zeros_like(h)
        return visible[b, head, q - base.query_offset, k - base.key_offset]

    mask = replace(base, right=None, rule=rule, examples=visible.shape[0])
    if real is None or bool(real.all()):
        return mask
    ends = with_padding(Mask.full(), real, visible.shape[0])  # which queries and keys count; the rule hides the rest
    return replace(mask, start=ends.start, end=ends.end)
