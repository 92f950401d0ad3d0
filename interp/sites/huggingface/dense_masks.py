"""Dense masks read back as rules: for users' 4-D masks, and sites whose own code holds a (query, key) mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.mask_structure import Structure, structure_of
from headscope.interp.sites.huggingface.masks import with_padding
from headscope.kernels.masks import Mask

ROWS = 512  # query rows compared at a time


@dataclass(frozen=True, eq=False)
class Dense:
    """The rule of a mask, what it adds to the scores (batch, 1 or head, query, key), and whether padding stands
    between tokens or positions cannot be told (``AttentionCall.gaps``)."""

    mask: Mask
    bias: Tensor | None = None
    gaps: bool = False


@dataclass(eq=False)
class DenseMasks:
    """The dense masks of one forward pass, each read once however many layers attend under it."""

    held: list[tuple[Tensor, tuple[int, ...], Dense]] = field(default_factory=list)

    def of(self, mask: Tensor, query: Tensor, keys: int, *, eager: bool, cross: bool) -> Dense:
        """What ``mask`` says of ``query`` (batch, head, query, d_head) and the first ``keys`` keys."""
        asked = (mask._version, query.shape[0], query.shape[2], keys, eager, cross)
        for known, how, found in self.held:
            if known is mask and how == asked:
                return found
        found = from_dense(mask[..., :keys], query, eager=eager, cross=cross)
        self.held.append((mask, asked, found))
        return found


def from_dense(mask: Tensor, query: Tensor, *, eager: bool, cross: bool) -> Dense:
    """A ready-made mask (batch, 1 or head, query, key) as the function that gets it reads it.

    A boolean mask hides where it is False, a floating-point one is added to the scores, and so is whatever ``eager``
    code gets, True as 1. Between two sequences (``cross``) it is looked up; of one sequence with itself it is read back
    as padding, packed sequences and a rule.

    Raises:
        HeadscopeError: another shape, or whole numbers where SDPA takes none.
    """
    if mask.dim() != 4:
        raise HeadscopeError(f"an attention mask of shape {tuple(mask.shape)} is not (batch, head, query, key)")
    if not mask.is_floating_point() and (eager or mask.dtype != torch.bool):
        if not eager:
            raise HeadscopeError(
                f"a 4-D attention mask of {mask.dtype} is neither boolean nor additive: give mask.bool()"
            )
        mask = mask.to(query.dtype)
    visible, bias = mask, None
    if mask.dtype != torch.bool:
        hidden = mask < torch.finfo(mask.dtype).min / 2
        added = mask.masked_fill(hidden, 0)
        bias = added if bool((added != 0).any()) else None
        visible = ~hidden
    batch, queries, keys = query.shape[0], query.shape[2], mask.shape[-1]
    base = Mask(query_offset=0 if cross else keys - queries, right=None)
    if cross:
        return Dense(_lookup(visible, base, None), bias)
    if visible.shape[1] == visible.shape[2] == 1 and queries == keys:  # padding, the same for every query
        real = visible[:, 0, 0].expand(batch, -1)
        padded = with_padding(Mask.full(), real, batch)
        return Dense(padded, bias, padded.rule is not None)
    if queries != keys:
        unseen = ~visible.any(1).any(1)  # (batch, key): by no query
        return Dense(_continued(visible, base), bias, bool((~visible[..., 0]).any() | unseen.any()))
    found = structure_of(visible.any(1).expand(batch, -1, -1))
    return Dense(_structured(visible, found), bias, found.gaps)


def _structured(visible: Tensor, found: Structure) -> Mask:
    """The rule of a whole self-attention mask whose padding and sequences were found."""
    base = Mask(right=0, segments=found.segments)
    for candidate in (base, replace(base, left=_reach(visible, base, found.real)), replace(base, right=None)):
        candidate = with_padding(candidate, found.real, found.real.shape[0])
        if agrees(candidate, visible):
            return candidate
    return replace(_lookup(visible, base, found.real), segments=found.segments)


def _continued(visible: Tensor, base: Mask) -> Mask:
    """The rule of queries that continue a cache: causal, or looked up."""
    causal = replace(base, right=0)
    return causal if agrees(causal, visible) else _lookup(visible, base, None)


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
    examples, heads, rows = visible.shape[:3]

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        example = b if examples > 1 else torch.zeros_like(b)
        head = h if heads > 1 else torch.zeros_like(h)
        row = q - base.query_offset if rows > 1 else torch.zeros_like(q)
        return visible[example, head, row, k - base.key_offset]

    batch = examples if real is None else real.shape[0]
    mask = replace(base, right=None, rule=rule, examples=batch)
    if real is None or bool(real.all()):
        return mask
    ends = with_padding(Mask.full(), real, batch)  # which queries and keys count; the rule hides the rest
    return replace(mask, start=ends.start, end=ends.end)
