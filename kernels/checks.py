"""Hold an engine to the definition: random calls, and errors bounded by what an eager computation itself loses.

An engine passes where its largest error against the float64 definition is at most twice that of a plain eager
computation in low precision on the same input (flash-attention's own test), plus a few float32 roundings. No tolerance
is chosen by hand, so a harder input allows more and an easier one less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.masks import Mask
from headscope.kernels.request import Attended, Request
from headscope.kernels.score_edits import ScoreEdit, by_distance, distance_slope, key_scale

ROUNDINGS = 8 * torch.finfo(torch.float32).eps
MASKS = (
    "causal",
    "full",
    "window",
    "band",
    "future",
    "left padding",
    "right padding",
    "padding, full",
    "chunks",
    "chunks from origin",
    "segments",
    "rule",
    "shifted keys",
    "empty rows",
)


@dataclass(frozen=True, eq=False)
class Case:
    """One attention call; shapes as in ``headscope.kernels.attention.attend``."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    edit: ScoreEdit | None = None

    def run(self, engine: Callable[..., Attended], request: Request) -> Attended:
        """The call under ``engine``."""
        return engine(
            self.q,
            self.k,
            self.v,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            bias=self.bias,
            edit=self.edit,
            request=request,
        )

    def pattern(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense pattern as eager attention computes it in ``dtype``: softmax in at least float32, then rounded."""
        s = self._scores(dtype)
        return reference.normalise(s.to(torch.promote_types(dtype, torch.float32)), self.sinks).to(dtype)

    def log_pattern(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The logarithm of the pattern, its scores rounded to ``dtype``; -inf at hidden keys."""
        s = self._scores(dtype).to(torch.promote_types(dtype, torch.float32))
        lse = reference.log_total(s, self.sinks)
        return s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]

    def eager(self, request: Request, dtype: torch.dtype = torch.float64) -> Attended:
        """Every reduction of the pattern that eager attention computes in ``dtype`` (float64: the definition)."""
        wide = torch.promote_types(dtype, torch.float32)
        s, p = self._scores(dtype).to(wide), self.pattern(dtype).to(wide)
        return reference.reduce(s, p, self.v.to(wide), mask=self.mask, sinks=self.sinks, request=request)

    def score_size(self) -> float:
        """The largest absolute score or lse: a float32 weight computed from them is off by this many roundings."""
        s = self._scores(torch.float64)
        return float(torch.cat([s[torch.isfinite(s)].abs(), s.new_ones(1)]).max())

    def _scores(self, dtype: torch.dtype) -> Tensor:
        q, k = self.q.to(dtype), self.k.to(dtype)
        options: dict[str, Any] = {"softcap": self.softcap, "bias": self.bias, "edit": self.edit}
        return reference.scores(q, k, mask=self.mask, scale=self.scale, **options)


@dataclass(frozen=True)
class Verdict:
    """The largest error of one result and what was allowed."""

    name: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for a NaN, too."""
        return self.error <= self.allowed


def compare(ours: Attended, case: Case, request: Request, *, precision: torch.dtype | None = None) -> list[Verdict]:
    """Verdicts on every result that ``request`` asks for.

    ``precision``: what the engine claims to compute statistics in (default: the inputs'). The output is held to the
    inputs' precision, in which it is returned.
    """
    truth = case.eager(request)
    low = case.eager(request, precision or case.q.dtype)
    verdicts = []
    for field in fields(truth):
        want = getattr(truth, field.name)
        if not isinstance(want, Tensor):
            continue
        got = getattr(ours, field.name)
        if got is None or (field.name != "key_count" and got.shape != want.shape):
            verdicts.append(Verdict(field.name, float("nan"), 0.0))
        elif field.name == "key_count":
            verdicts.append(Verdict(field.name, float((got.expand_as(want) != want).sum()), 0.0))
        elif field.name == "top_keys":
            verdicts.append(_top_keys(ours, truth, low, case, request))
        else:
            lossy = getattr(case.eager(request, case.q.dtype) if field.name == "output" else low, field.name)
            if field.name == "output":
                lossy = lossy.to(case.v.dtype)
            # a distance is a difference of positions; a weight exp(s - lse) carries the roundings of s
            size = case.k.shape[2] if "distance" in field.name else case.score_size()
            verdicts.append(Verdict(field.name, distance(got, want), allowed(lossy, want, size=size)))
    return verdicts


def allowed(lossy: Tensor, truth: Tensor, *, size: float = 1.0) -> float:
    """The error an engine may make where eager attention computed ``lossy`` for ``truth`` from terms up to ``size``."""
    finite = truth[torch.isfinite(truth)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return 2.0 * distance(lossy, truth) + ROUNDINGS * max(size, largest)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinities must agree, and NaN is returned where either holds one."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def _top_keys(ours: Attended, truth: Attended, low: Attended, case: Case, request: Request) -> Verdict:
    """Reported keys must hold, in the exact pattern, the mass of the true ones (ties may be broken either way)."""
    keys, mass = ours.top_keys, truth.top_mass
    assert keys is not None and mass is not None and low.top_mass is not None
    p = case.pattern()
    if request.query_rows is not None:
        p = p[:, :, request.query_rows]
    at = (keys - case.mask.key_offset).clamp(0, max(0, p.shape[-1] - 1))
    held = p.gather(-1, at) * (keys >= 0)
    ordered = keys.sort(-1).values
    repeated = int(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum())
    return Verdict("top_keys", distance(held, mass) + repeated, allowed(low.top_mass, mass))


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
        "padding, full": lambda: Mask(query_offset=offset, right=None, start=at(0.0, 0.3), end=at(1.0, 0.7)),
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
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Case:
    """A random call with the mask ``kind`` of ``MASKS``; scores have a standard deviation of about 2.

    A ``bias`` hides every eighth key or so of a head: it is -inf there.
    """
    gen = torch.Generator().manual_seed(seed)
    heads = kv_heads * group

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(device=device)

    def key_bias() -> Tensor:
        hidden = torch.rand(batch, heads, keys, generator=gen) < 0.125
        return normal(batch, heads, keys).masked_fill(hidden.to(device), -torch.inf)

    return Case(
        q=(2.0 * normal(batch, heads, queries, d_head)).to(dtype),
        k=normal(batch, kv_heads, keys, d_head).to(dtype),
        v=normal(batch, kv_heads, keys, d_value or d_head).to(dtype),
        mask=random_mask(kind, batch, queries, keys, device),
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
    table = by_distance(scale=0.5 + uniform(heads, 20), bias=uniform(1, 9))
    hide = ScoreEdit(lambda s, b, h, q, k: torch.where((k + b) % 4 == h % 4, -torch.inf, s))
    return {
        "distance slope": slope,
        "key scale": scale,
        "distance table": table,
        "hidden keys": hide,
        "two, on some heads": table.then(scale).on_heads(range(1, heads, 2), heads, device=device),
    }


def everything(case: Case, *, seed: int = 0, subset: bool = False, top: int = 5, features: int = 3) -> Request:
    """A request for every reduction; ``subset``: rows on every third query, columns over the second half.

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
        query_rows=torch.arange(0, queries, 3, device=device) if subset else None,
        key_sum=True,
        key_max=True,
        key_count=True,
        key_queries=(queries // 2, queries) if subset else None,
    )
