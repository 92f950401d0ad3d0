"""Random calls for tests and for checks on a card: masks of every kind, edits, and a request for everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.edit_terms import Term
from headscope.kernels.masks import Mask
from headscope.kernels.redistribution import Move, Redistribution, dense
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.score_edits import ScoreEdit, by_distance, distance_slope, key_scale
from headscope.kernels.scores import Scores

MASKS = (
    "causal",
    "full",
    "window",
    "band",
    "future",
    "left padding",
    "right padding",
    "padding of full",
    "chunks",
    "chunks from origin",
    "segments",
    "rule",
    "shifted keys",
    "empty rows",
)
# d_head, d_value: each class of tiles, filled and not, and two that differ
WIDTHS = ((16, 16), (60, 60), (64, 64), (80, 80), (96, 128), (128, 128), (128, 64), (256, 256))


@dataclass(eq=False, kw_only=True)
class Case(Scores):
    """One attention call: scores and values; shapes as in ``headscope.kernels.attention.attend``.

    Where mass is moved, ``pattern`` and ``eager`` are of what ``redistribute`` gives, and that is the engine to run.
    """

    v: Tensor
    move: Move | None = None

    def run(self, engine: Callable[..., Reduced], request: Request) -> Reduced:
        """The call under ``engine``."""
        moved = {} if self.move is None else {"move": self.move}
        return engine(self, self.v, request=request, **moved)

    def pattern(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense pattern as eager attention computes it in ``dtype``: softmax in at least float32, then rounded."""
        s = self._scores(dtype)
        p = reference.normalise(s.to(torch.promote_types(dtype, torch.float32)), self.sinks)
        return (p if self.move is None else dense(p, self.move)).to(dtype)

    def log_pattern(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The logarithm of the pattern, its scores rounded to ``dtype``; -inf at hidden keys."""
        s = self._scores(dtype).to(torch.promote_types(dtype, torch.float32))
        lse = reference.log_total(s, self.sinks)
        return s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]

    def eager(self, request: Request, dtype: torch.dtype = torch.float64) -> Reduced:
        """Every reduction of the pattern that eager attention computes in ``dtype`` (float64: the definition)."""
        wide = torch.promote_types(dtype, torch.float32)
        s, p = self._scores(dtype).to(wide), self.pattern(dtype).to(wide)
        return reference.reduce(s, p, self.v.to(wide), mask=self.mask, sinks=self.sinks, request=request)

    def score_size(self) -> float:
        """The largest absolute score or lse: a float32 weight computed from them is off by this many roundings."""
        s = self._scores(torch.float64)
        return float(torch.cat([s[torch.isfinite(s)].abs(), s.new_ones(1)]).max())

    def _scores(self, dtype: torch.dtype) -> Tensor:
        return reference.dense_scores(replace(self, q=self.q.to(dtype), k=self.k.to(dtype)))


def random_mask(kind: str, batch: int, queries: int, keys: int, device: torch.device | str = "cpu") -> Mask:
    """One mask of ``MASKS`` for queries that end where the keys end."""
    offset = keys - queries

    def at(*fractions: float) -> Tensor:
        picks = [int(keys * fractions[b % len(fractions)]) for b in range(batch)]
        return torch.tensor(picks, device=device)

    masks = {
        "causal": lambda: Mask.causal(offset),
        "full": lambda: Mask.full(),
        "window": lambda: Mask.causal(offset, window=max(1, keys // 5)),
        "band": lambda: Mask(query_offset=offset, left=5, right=7),
        "future": lambda: Mask(query_offset=offset, left=0, right=None),
        "left padding": lambda: Mask(query_offset=offset, start=at(0.0, 0.3, 0.6)),
        "right padding": lambda: Mask(query_offset=offset, end=at(1.0, 0.8, 0.5)),
        "padding of full": lambda: Mask(query_offset=offset, right=None, start=at(0.0, 0.3), end=at(1.0, 0.7)),
        "chunks": lambda: Mask(query_offset=offset, chunk=max(1, keys // 3)),
        "chunks from origin": lambda: Mask(query_offset=offset, chunk=max(1, keys // 4), origin=at(0.1, 0.4)),
        "segments": lambda: Mask(query_offset=offset, segments=(torch.arange(keys, device=device) * 4 // keys)[None]),
        "rule": lambda: Mask(
            query_offset=offset, right=None, rule=lambda b, h, q, k: (k <= q) | ((k + h) % 3 == b), examples=batch
        ),
        "shifted keys": lambda: Mask(query_offset=offset + 9, key_offset=11, right=2),
        "empty rows": lambda: Mask(query_offset=-(queries // 2), right=0, left=keys // 2),
    }
    return masks[kind]()


def padded(mask: Mask, padding: tuple[int, int], batch: int, keys: int, device: torch.device | str = "cpu") -> Mask:
    """``mask`` with this many positions hidden at the left and at the right of the last of ``batch`` examples."""
    start, end = (torch.full((batch,), x, device=device) for x in (0, keys))
    start[-1], end[-1] = padding[0], keys - padding[1]
    return replace(mask, start=start if padding[0] else mask.start, end=end if padding[1] else mask.end)


def paddings(*tiles: int) -> list[tuple[int, int]]:
    """Paddings (left, right) just below, at and just above one of ``tiles`` positions, on either side and on both."""
    sizes = sorted({size + off for size in tiles for off in (-1, 0, 1)})
    return [pair for n in sizes for pair in ((n, 0), (0, n), (n, n))]


def random_case(
    kind: str,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    queries: int = 63,
    keys: int = 63,
    d_head: int = 32,
    d_value: int | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    sinks: bool = False,
    bias: bool = False,
    padding: tuple[int, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """A random call with the mask ``kind`` of ``MASKS``; scores have a standard deviation of about 2.

    A ``bias`` hides every eighth key or so of a head: it is -inf there. ``padding``: this many positions are hidden at
    the left and at the right of the last example, beside what the mask hides.
    """
    gen = torch.Generator().manual_seed(seed)
    heads = kv_heads * group

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(device=device)

    def key_bias() -> Tensor:
        hidden = torch.rand(batch, heads, keys, generator=gen) < 0.125
        return normal(batch, heads, keys).masked_fill(hidden.to(device), -torch.inf)

    mask = random_mask(kind, batch, queries, keys, device)
    return Case(
        q=(2.0 * normal(batch, heads, queries, d_head)).to(dtype),
        k=normal(batch, kv_heads, keys, d_head).to(dtype),
        v=normal(batch, kv_heads, keys, d_value or d_head).to(dtype),
        mask=mask if padding is None else padded(mask, padding, batch, keys, device),
        scale=d_head**-0.5,
        softcap=softcap,
        sinks=normal(heads) if sinks else None,
        bias=key_bias() if bias else None,
    )


def random_edits(case: Case, *, seed: int = 0) -> dict[str, ScoreEdit]:
    """Score edits of every kind for ``case``, by name."""
    gen = torch.Generator().manual_seed(seed)
    heads, device = case.q.shape[1], case.q.device
    last = case.k.shape[2] + abs(case.mask.key_offset)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen).to(device)

    slope = distance_slope(uniform(heads) / 8)
    scale = key_scale(0.5 + uniform(1, last))
    neutral = key_scale(torch.tensor([1.0, 0.0, -1.0, 2.0], device=device).repeat(last)[None, :last])
    squash = ScoreEdit(lambda s, b, h, q, k: 3 * torch.tanh(s / 3))  # as distant from a hidden score as can be
    table = by_distance(scale=0.5 + uniform(heads, 20), bias=uniform(1, 9))
    hide = ScoreEdit(lambda s, b, h, q, k: torch.where((k + b) % 4 == h % 4, -torch.inf, s))
    (batch, _, queries, keys), mask = case.shape, case.mask
    on_rows = (uniform(batch, heads, queries) < 0.7).float()
    span = (uniform(batch, 1, keys) < 0.4).float()
    at: dict[str, Any] = {"first_query": mask.query_offset, "first_key": mask.key_offset}
    factor = Term(of="score", queries=uniform(batch, heads, queries) - 0.5, **at)
    raised = Term(of="size", queries=on_rows * 0.7, keys=span, **at)
    taken = Term(queries=on_rows, keys=torch.where(uniform(1, heads, keys) < 0.2, -torch.inf, 0.5), **at)
    recent = Term(queries=torch.full((1, 1, 1), 0.9, device=device), within=(1, 7))
    decay = Term(of="positive", distances=-uniform(1, heads, 30), first_distance=-10)
    return {
        "rows and keys": ScoreEdit.of(factor, raised),
        "keys taken from rows": ScoreEdit.of(taken),
        "recent keys": ScoreEdit.of(recent),
        "every term": ScoreEdit.of(taken, decay, recent, raised, factor, *(slope.terms or ())),
        "a function's table": ScoreEdit(table.function),
        "distance slope": slope,
        "key scale": scale,
        "distance table": table,
        "hidden keys": hide,
        "keys turned round": neutral,
        "bounded scores": squash,
        "two, on some heads": table.then(scale).on_heads(range(1, heads, 2), heads, device=device),
    }


def random_moves(case: Case, *, seed: int = 0) -> dict[str, Move]:
    """Redistributions of every kind for ``case``, by name."""
    gen = torch.Generator().manual_seed(seed)
    batch, heads, queries, keys, device = *case.q.shape[:3], case.k.shape[2], case.q.device
    first, none = torch.arange(keys, device=device) < 1, torch.zeros(keys, dtype=torch.bool, device=device)
    scattered = (torch.rand(batch, heads, keys, generator=gen) < 0.2).to(device)
    image = (torch.rand(batch, 1, keys, generator=gen) < 0.5).to(device)
    rows = torch.rand(batch, heads, queries, generator=gen).to(device)
    alone: dict[str, Redistribution] = {
        "no first key": Redistribution(first),
        "a head's own keys": Redistribution(scattered, torch.linspace(0.0, 2.5, heads, device=device)),
        "onto a set": Redistribution(scattered, torch.where(rows < 0.5, 1.0, rows), onto=image),
        "more than there is": Redistribution(scattered, 30.0, onto=image),
        "nobody gives": Redistribution(none, 0.3, onto=image),
        "nobody takes": Redistribution(scattered, 0.3, onto=none),
        "lost to the row": Redistribution(scattered, 2.0 * rows, freed="lost"),
        "rescaled": Redistribution(scattered, torch.where(rows < 0.3, 0.0, 2.0 * rows), freed="rescaled"),
        "rescaled, nobody takes": Redistribution(scattered, 0.3, onto=none, freed="rescaled"),
    }
    onto, rescaled = alone["onto a set"], alone["rescaled"]
    return {
        **alone,
        "two": rescaled.then(onto),
        "the other way round": onto.then(rescaled),
        "back onto what was emptied": alone["no first key"].then(Redistribution(~first, 0.4)),
        "three": alone["lost to the row"].then(onto).then(alone["a head's own keys"]),
    }


def everything(case: Case, *, seed: int = 0, subset: bool = False, top: int = 5, features: int = 3) -> Request:
    """A request for every reduction; ``subset``: rows of some queries, near and far, columns of the second half
    and of some before it.

    Linear columns are ``features`` of random numbers; 0: the memberships of a sink and of short and long spans.
    """
    gen = torch.Generator().manual_seed(seed)
    batch, _, queries, _ = case.q.shape
    keys, device = case.k.shape[2], case.q.device
    columns = torch.randn(batch, keys, features, generator=gen)
    columns[..., :1] = 1.0  # the mass
    if features == 0:
        at = torch.arange(keys)
        long = [at // (keys // 3 + 1) == n for n in range(3)]
        columns = torch.stack([at < 4, (at // 50) == keys // 150, *long], -1).expand(batch, -1, -1)
    ranges = [(queries // 2, queries), (queries // 3, min(queries, queries // 2 + 2))] if subset else [None]
    near = torch.arange(0, (queries + 1) // 2, 3, device=device)
    targets = torch.randint(-1, keys + 2, (batch, queries, 2), generator=gen) + case.mask.key_offset
    return Request(
        output=True,
        lse=True,
        max=True,
        entropy=True,
        linear=columns.to(device),
        distance=True,
        windows=(4, 30),
        top=top,
        targets=targets.to(device),
        query_rows=torch.cat([near, near.new_tensor(range(queries - queries // 4, queries))]) if subset else None,
        columns=tuple(Columns(part, sum=True, max=True, count=True) for part in ranges),
    )
