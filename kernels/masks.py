"""Which keys a query may see, as a rule that is evaluated tile by tile: never a query x key tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

_PLAIN = frozenset((int, type(None)))

# An index function, broadcast over its arguments: (batch, head, query position, key position) -> bool.
IndexRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of visibility rules over absolute positions.

    Query row ``i`` stands at position ``query_offset + i``, key ``j`` at ``key_offset + j``. A key at position ``k`` is
    visible to a query at position ``q`` iff every rule that is set allows it:

    * ``right``: ``k <= q + right`` (causal attention is ``right=0``);
    * ``left``: ``k >= q - left`` (a sliding window of ``w`` tokens is ``left=w-1``);
    * ``start``, ``end``: ``start[b] <= k < end[b]`` (left and right padding), integer tensors of shape (batch,);
    * ``chunk``: ``(k - origin[b]) // chunk == (q - origin[b]) // chunk`` (``origin`` (batch,) or None);
    * ``segments``: ``segments[b, k] == segments[b, q]`` (packed sequences), integer tensor (batch, positions). On a GPU
      what is worked out of it is kept while torch counts no change of it: change it by torch's own operations
      (``segments[0, 3] = 1``), not through ``.data`` or an array that shares its memory, or give a new tensor;
    * ``rule``: any index function of (batch, head, q, k), evaluated only on the tiles that are computed, for
      ``examples`` examples (1: the same for all).

    A query whose keys are all invisible is an *empty row*: its statistics are defined in ``headscope.kernels.request``.
    """

    query_offset: int = 0
    key_offset: int = 0
    left: int | None = None
    right: int | None = 0
    start: Tensor | None = None
    end: Tensor | None = None
    chunk: int | None = None
    origin: Tensor | None = None
    segments: Tensor | None = None
    rule: IndexRule | None = None
    examples: int = 1

    def __post_init__(self) -> None:
        numbers = (self.query_offset, self.key_offset, self.left, self.right, self.chunk)
        if not _PLAIN.issuperset(map(type, numbers)):  # numpy's are no numbers to Triton
            for name, x in zip(("query_offset", "key_offset", "left", "right", "chunk"), numbers, strict=True):
                if isinstance(x, Integral):
                    object.__setattr__(self, name, int(x))

    @classmethod
    def causal(cls, query_offset: int = 0, *, window: int | None = None) -> Mask:
        """Causal attention, the first query at position ``query_offset``; ``window`` counts the query itself."""
        return cls(query_offset=query_offset, left=None if window is None else window - 1, right=0)

    @classmethod
    def full(cls) -> Mask:
        """Every query sees every key."""
        return cls(right=None)

    @property
    def numbers(self) -> tuple[int | bool | None, ...]:
        """What tells masks apart beside ``tensors``, if neither has a ``rule``; a mask that has one is another kind."""
        return self.query_offset, self.key_offset, self.left, self.right, self.chunk, self.rule is None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds on the device, but for what a ``rule`` holds."""
        return self.start, self.end, self.origin, self.segments

    @property
    def is_plain_causal(self) -> bool:
        """True where only causality restricts the keys (what a library kernel's ``is_causal`` means)."""
        return self.right == 0 and self.only_band and self.left is None

    @property
    def is_full(self) -> bool:
        """True where no rule is set."""
        return self.right is None and self.left is None and self.only_band

    @property
    def only_band(self) -> bool:
        """Whether no rule but ``left`` and ``right`` is set."""
        padded = self.start is not None or self.end is not None  # asked in every call of every layer: no loop
        return not padded and self.chunk is None and self.segments is None and self.rule is None

    def select_batch(self, first: int, stop: int) -> Mask:
        """The same mask for examples ``first:stop``; a ``rule`` is told the absolute example index."""

        def cut(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[first:stop]

        rule = self.rule
        if rule is not None and first and self.examples > 1:
            whole = rule
            rule = lambda b, h, q, k: whole(b + first, h, q, k)  # noqa: E731
        return replace(
            self,
            start=cut(self.start),
            end=cut(self.end),
            origin=cut(self.origin),
            segments=cut(self.segments),
            rule=rule,
            examples=1 if self.examples == 1 else stop - first,
        )

    def alike(self, other: Mask) -> bool:
        """Whether both hide the same keys for sure; two index rules are never known to."""
        numbers = ("query_offset", "key_offset", "left", "right", "chunk")
        tensors = [(getattr(self, name), getattr(other, name)) for name in ("start", "end", "origin", "segments")]
        return (
            all(getattr(self, name) == getattr(other, name) for name in numbers)
            and all((a is b) or (a is not None and b is not None and torch.equal(a, b)) for a, b in tensors)
            and self.rule is None
            and other.rule is None
        )

    def key_bounds(self, q0: int, q1: int, keys: int) -> tuple[int, int]:
        """Key indices ``(lo, hi)`` outside which no key is visible to any query row of ``q0:q1`` (``lo == hi``: none).

        ``keys`` is the number of keys. Uses ``left``, ``right``, ``start`` and ``end``; the other rules only hide more.
        """
        lo, hi = 0, keys
        if self.left is not None:
            lo = max(lo, q0 + self.query_offset - self.left - self.key_offset)
        if self.right is not None:
            hi = min(hi, q1 - 1 + self.query_offset + self.right - self.key_offset + 1)
        if self.start is not None and self.start.numel():
            lo = max(lo, int(self.start.min()) - self.key_offset)
        if self.end is not None and self.end.numel():
            hi = min(hi, int(self.end.max()) - self.key_offset)
        return (lo, hi) if lo < hi else (0, 0)

    def band(self, q: Tensor, k: Tensor) -> Tensor | None:
        """``left`` and ``right`` alone for positions ``q`` (n,), ``k`` (m,): bool (n, m), None where nothing hides."""
        seen: Tensor | None = None
        if self.right is not None and int(k[-1]) > int(q[0]) + self.right:
            seen = k[None, :] <= q[:, None] + self.right
        if self.left is not None and int(k[0]) < int(q[-1]) - self.left:
            near = k[None, :] >= q[:, None] - self.left
            seen = near if seen is None else seen & near
        return seen

    def tile(self, rows: Tensor, keys: Tensor, heads: Tensor | None = None) -> Tensor | None:
        """Visibility of key indices ``keys`` (m,) to query rows ``rows`` (n,), both ascending.

        Returns bool of shape (batch or 1, head or 1, n, m), or None where every key is visible to every row.
        ``heads`` (h,) are the absolute head indices for a ``rule`` that depends on the head.
        """
        q, k = rows + self.query_offset, keys + self.key_offset
        band = self.band(q, k)
        seen = None if band is None else band[None, None]

        def both(a: Tensor | None, b: Tensor) -> Tensor:
            return b if a is None else a & b

        if self.start is not None and int(self.start.max()) > int(k[0]):
            seen = both(seen, (k >= self.start[:, None])[:, None, None, :])
        if self.end is not None and int(self.end.min()) <= int(k[-1]):
            seen = both(seen, (k < self.end[:, None])[:, None, None, :])
        if self.chunk is not None:
            origin = torch.zeros(1, dtype=k.dtype, device=k.device) if self.origin is None else self.origin
            at = origin[:, None]
            same = ((k - at) // self.chunk)[:, None, :] == ((q - at) // self.chunk)[:, :, None]
            seen = both(seen, same[:, None])
        if self.segments is not None:
            same = self.segments[:, q][:, :, None] == self.segments[:, k][:, None, :]
            seen = both(seen, same[:, None])
        if self.rule is not None:
            seen = both(seen, self._evaluate_rule(q, k, heads))
        return seen

    def _evaluate_rule(self, q: Tensor, k: Tensor, heads: Tensor | None) -> Tensor:
        assert self.rule is not None
        b = torch.arange(self.examples, device=q.device)
        h = torch.zeros(1, dtype=torch.long, device=q.device) if heads is None else heads
        seen = self.rule(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k[None, None, None, :])
        return seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, q.numel(), k.numel())))

    def pairs(self, rows: Tensor, keys: Tensor, heads: Tensor) -> Tensor:
        """Visibility of single (query row, key index) pairs: ``rows`` broadcasts to ``keys`` (batch, n, t).

        Returns bool of shape (batch, 1 or head, n, t); ``heads`` (h,) are told to a ``rule``.
        """
        q, k = rows + self.query_offset, keys + self.key_offset
        seen = torch.ones_like(k, dtype=torch.bool)
        if self.right is not None:
            seen = seen & (k <= q + self.right)
        if self.left is not None:
            seen = seen & (k >= q - self.left)
        if self.start is not None:
            seen = seen & (k >= self.start[:, None, None])
        if self.end is not None:
            seen = seen & (k < self.end[:, None, None])
        if self.chunk is not None:
            origin = 0 if self.origin is None else self.origin[:, None, None]
            seen = seen & ((k - origin) // self.chunk == (q - origin) // self.chunk)
        if self.segments is not None:
            segments = self.segments.expand(k.shape[0], -1)
            of_query = segments.gather(1, q.expand_as(k).flatten(1)).view_as(k)
            seen = seen & (of_query == segments.gather(1, k.flatten(1)).view_as(k))
        if self.rule is None:
            return seen[:, None]
        b = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
        return seen[:, None] & self.rule(b, heads[None, :, None, None], q[:, None], k[:, None])

    def query_is_real(self, rows: Tensor) -> Tensor | None:
        """Whether each query row (n,) is a token, not padding: bool (batch, n), or None where there is no padding.

        Padding hides the same positions as queries and as keys (self-attention), so a padded query is not counted by
        the statistics that sum over queries.
        """
        if self.start is None and self.end is None:
            return None
        q = rows + self.query_offset
        real = torch.ones(1, q.numel(), dtype=torch.bool, device=q.device)
        if self.start is not None:
            real = real & (q >= self.start[:, None])
        if self.end is not None:
            real = real & (q < self.end[:, None])
        return real
