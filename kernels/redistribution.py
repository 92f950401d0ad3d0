"""Mass moved between keys after softmax: what no change of scores says, put together from attention over sets of keys.

A rescale of keys *with* renormalisation is a logit bias (``attend(..., bias=log c)``, identity 5 of the design) and is
answered by every engine; any other change before softmax is a ``ScoreEdit``. Here keys C keep a share of their mass,
and takers B take up what they lose, each in proportion to its weight, while the rest R stays (identity 6):

1. Attention over a set S alone has the pattern exp(s - lse_S); the whole pattern is w_S times that on each set, with
   w_S = exp(lse_S - lse) and lse the log of the sum over sets (and of a sink logit, which keeps its share).
2. The edited pattern has other factors: W_C = a w_C, W_B = w_B + (1 - a) w_C and W_R = w_R, with a the share that is
   kept, lowered to 1 + w_B / w_C where C would take more than B has. A row whose takers hold nothing stays as it is.
3. Sums of the pattern, of which the output is one, are sums over sets: X = sum_S W_S X_S. As every term is added and
   none taken away, nothing cancels where a sink held nearly all the mass.
4. The entropy is H = sum_S (W_S H_S - W_S log W_S); the heaviest keys are among the heaviest of each set; a column of
   W_S exp(s - lse_S) is that of a pattern whose lse is lse_S - log W_S (``columns``). Scores, so lse and max, stay.

A set is a slice of the keys and a bias that hides the others in it, so no kernel is needed: up to three passes, and as
many for columns. Definition: ``dense``. Sources: ACT (Yu et al. 2024, arXiv 2406.15765: from a head's sinks to every
other key) and VAR (Kang et al. 2025, arXiv 2503.03321: from sinks to the image's other tokens); which heads, queries
and keys is their choice, and the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention, reference
from headscope.kernels.columns import columns
from headscope.kernels.counts import count_queries
from headscope.kernels.masks import Mask
from headscope.kernels.request import Attended, Request
from headscope.kernels.score_edits import ScoreEdit

SUMS = ("output", "entropy", "linear", "distance", "window_mass", "window_distance", "target_mass")
ROWS = ("lse", "max", *SUMS[1:], "top_mass", "top_keys")


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Keys keep a share of their mass, and others take up the rest.

    ``keys`` and ``onto`` are bool, (key,) or (batch or 1, head or 1, key): which keys give, and which take, those that
    give excepted; None means every other key. ``keep`` is the share that givers keep, at least 0: a number, one a head
    (head,), or (batch or 1, head or 1, query or 1). 0 removes sinks, 1 leaves a head or a query alone, more moves mass
    onto the keys.
    """

    keys: Tensor
    keep: float | Tensor = 0.0
    onto: Tensor | None = None

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError where this does not fit a call of these sizes."""
        for name, x in (("keys", self.keys), ("onto", self.onto)):
            if x is not None and (x.dtype != torch.bool or not _fits(x, (batch, heads, keys))):
                shape = f"({keys},) or ({batch} or 1, {heads} or 1, {keys})"
                raise ValueError(f"{name} must be bool {shape}; got {x.dtype} {tuple(x.shape)}")
        keep = torch.as_tensor(self.keep)
        if keep.shape not in ((), (heads,)) and not (keep.dim() == 3 and _fits(keep, (batch, heads, queries))):
            shape = f"a number, ({heads},) or ({batch} or 1, {heads} or 1, {queries} or 1)"
            raise ValueError(f"keep must be {shape}; got {tuple(keep.shape)}")
        if not bool((keep >= 0).all()):
            raise ValueError("the share of their mass that keys keep must be at least 0")

    def sets(self, device: torch.device) -> list[Tensor]:
        """Givers, takers and, where there are any, the rest: bool (batch or 1, head or 1, key) each."""
        givers = _three(self.keys).to(device)
        if self.onto is None:
            return [givers, ~givers]
        takers = _three(self.onto).to(device) & ~givers
        return [givers, takers, ~(givers | takers)]

    def masses(self, before: list[Tensor]) -> list[Tensor]:
        """Step 2: W of every set from the w before, each (batch, head, query)."""
        givers, takers = before[:2]
        keep = torch.as_tensor(self.keep, device=givers.device, dtype=givers.dtype)
        keep = keep[:, None] if keep.dim() == 1 else keep
        most = 1 + takers / givers.clamp(min=torch.finfo(givers.dtype).tiny)
        a = torch.where(takers > 0, torch.minimum(keep, most), 1.0)
        return [a * givers, (takers + (1 - a) * givers).clamp(min=0.0), *before[2:]]


def _fits(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    if x.dim() == 1:
        return x.shape[0] == sizes[-1]
    return x.dim() == 3 and all(n in (1, size) for n, size in zip(x.shape, sizes, strict=True))


def _three(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[None, None]


def dense(p: Tensor, move: Redistribution) -> Tensor:
    """The definition: a pattern ``p`` (batch, head, query, key) after ``move``."""
    sets = [x[:, :, None] for x in move.sets(p.device)]
    before = [(p * x).sum(-1) for x in sets]
    for x, w, after in zip(sets, before, move.masses(before), strict=True):
        p = torch.where(x, p * (after / torch.where(w > 0, w, 1.0))[..., None], p)
    return p


def redistribute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    move: Redistribution,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    request: Request,
    engine: attention.Engine = "auto",
) -> Attended:
    """``attention.attend`` with the mass moved: the output and every reduction of the edited pattern.

    ``q`` (batch, head, query, d), ``k``, ``v`` (batch, kv_head, key, ·); ``lse`` and ``max`` are of the scores, which
    do not change. The output keeps its gradient where an input requires one: it is then computed densely. Raises
    ValueError where ``move`` does not fit.
    """
    attention.check_request(q, k, request)
    scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "edit": edit}
    out = None
    if request.output and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        move.check(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        wide = torch.promote_types(q.dtype, torch.float32)
        p = reference.pattern(q.to(wide), k.to(wide), mask=mask, sinks=sinks, bias=bias, **scores)
        out = (dense(p, move) @ v.to(wide).repeat_interleave(q.shape[1] // v.shape[1], dim=1)).to(v.dtype)
        request = replace(request, output=False)
    parts, lse = _attended(q, k, v, move, mask, sinks, bias, request, engine, scores)
    result = _summed(parts, lse, request, v.dtype)
    if request.key_sum or request.key_max:
        _reduce_columns(result, q, k, parts, request, engine, scores)
    if request.key_count:
        result.key_count = count_queries(mask, q, k.shape[2], request.key_queries or (0, q.shape[2]))
    result.output = result.output if out is None else out
    return result


@torch.no_grad()
def pattern(
    q: Tensor,
    k: Tensor,
    move: Redistribution,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """One exact tile of the edited pattern: rows ``rows`` and keys ``keys``, as ``attention.pattern`` gives it."""
    scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "edit": edit}
    parts, _ = _attended(q, k, k, move, mask, sinks, bias, Request(output=False), "auto", scores)
    first, stop, _ = keys.indices(k.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q[:, :, rows].shape[:3], max(0, stop - first), dtype=wide, device=q.device)
    for part in parts:
        a, b = max(first, part.keys.start), min(stop, part.keys.stop)
        if a < b:
            inside = slice(a - part.keys.start, b - part.keys.start)
            own = attention.pattern(
                q, k[:, :, part.keys], mask=part.mask, bias=part.bias, rows=rows, keys=inside, **scores
            )
            out[..., a - first : b - first] += own * part.mass[:, :, rows, None]
    return out


class _Part(NamedTuple):
    """Attention over a set: the slice of the keys that holds it, that slice's mask, a bias that hides its other keys,
    what was found, its lse and the set's mass W after the edit (batch, head, query)."""

    keys: slice
    mask: Mask
    bias: Tensor | None
    found: Attended
    lse: Tensor
    mass: Tensor


@torch.no_grad()
def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    move: Redistribution,
    mask: Mask,
    sinks: Tensor | None,
    bias: Tensor | None,
    request: Request,
    engine: attention.Engine,
    scores: dict[str, Any],
) -> tuple[list[_Part], Tensor]:
    """Steps 1 and 2: every set of ``move``; and the lse of all of them (batch, head, query)."""
    attention.check(q, k, v, sinks, bias)
    move.check(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    asked = replace(request, lse=True, query_rows=None, key_sum=False, key_max=False, key_count=False)
    parts, norms = [], []
    for chosen in move.sets(q.device):
        keys, here, own = _slice(chosen, mask, bias)
        linear = None if asked.linear is None else asked.linear[..., keys, :]
        options: dict[str, Any] = {"mask": here, "bias": own, "engine": engine, **scores}
        found = attention.attend(q, k[:, :, keys], v[:, :, keys], request=replace(asked, linear=linear), **options)
        assert found.lse is not None
        parts.append((keys, here, own, found))
        norms.append(found.lse)
    lse = reference.log_total(torch.stack(norms, -1), sinks)
    before = [torch.exp(norm - lse).masked_fill(norm == -torch.inf, 0.0) for norm in norms]
    after = move.masses(before)
    return [_Part(*part, norm, mass) for part, norm, mass in zip(parts, norms, after, strict=True)], lse


def _slice(chosen: Tensor, mask: Mask, bias: Tensor | None) -> tuple[slice, Mask, Tensor | None]:
    """The slice that holds the keys ``chosen`` (batch or 1, head or 1, key), its mask, and its bias."""
    some = chosen.flatten(0, 1).any(0).nonzero()[:, 0].tolist() or [0]  # no key: one that is hidden
    keys = slice(some[0], some[-1] + 1)
    own = None if bias is None else bias[..., keys]
    if not chosen[..., keys].all():
        own = torch.where(chosen[..., keys], 0.0 if own is None else own, -torch.inf)
    return keys, replace(mask, key_offset=mask.key_offset + keys.start), own


def _summed(parts: list[_Part], lse: Tensor, request: Request, dtype: torch.dtype) -> Attended:
    """Steps 3 and 4: the output, in ``dtype``, and the rows."""
    result = Attended(lse=lse if request.lse else None)
    for name in SUMS:
        if getattr(parts[0].found, name) is not None:
            setattr(result, name, reduce(torch.add, _terms(parts, name)))
    if result.entropy is not None:
        result.entropy = reduce(torch.add, (torch.special.entr(part.mass) for part in parts), result.entropy)
    if request.max:
        result.max = torch.stack([part.found.max for part in parts if part.found.max is not None]).amax(0)
    if request.top:
        mass = torch.cat(list(_terms(parts, "top_mass")), -1)
        keys = torch.cat([part.found.top_keys for part in parts if part.found.top_keys is not None], -1)
        result.top_mass, at = mass.topk(request.top, dim=-1)
        result.top_keys = keys.gather(-1, at).masked_fill(result.top_mass <= 0, -1)
    if request.query_rows is not None:
        for name in ROWS:
            x = getattr(result, name)
            setattr(result, name, None if x is None else x[:, :, request.query_rows])
    result.output = None if result.output is None else result.output.to(dtype)
    return result


def _terms(parts: list[_Part], name: str) -> Iterator[Tensor]:
    """The result ``name`` (batch, head, query, ...) of every set, times the set's mass."""
    for part in parts:
        x = getattr(part.found, name)
        yield x * part.mass.view(part.mass.shape + (1,) * (x.dim() - 3))


def _reduce_columns(
    result: Attended,
    q: Tensor,
    k: Tensor,
    parts: list[_Part],
    request: Request,
    engine: attention.Engine,
    scores: dict[str, Any],
) -> None:
    """Step 4 for the columns."""
    zero = parts[0].mass.new_zeros(q.shape[0], q.shape[1], k.shape[2])
    result.key_sum = zero if request.key_sum else None
    result.key_max = zero.clone() if request.key_max else None
    for part in parts:
        norm = torch.where(part.mass > 0, part.lse - part.mass.log(), torch.inf)
        found = columns(
            q,
            k[:, :, part.keys],
            norm,
            mask=part.mask,
            bias=part.bias,
            queries=request.key_queries,
            total=request.key_sum,
            highest=request.key_max,
            engine=engine,
            **scores,
        )
        if result.key_sum is not None and found.total is not None:
            result.key_sum[..., part.keys] += found.total
        if result.key_max is not None and found.highest is not None:
            here = result.key_max[..., part.keys]
            torch.maximum(here, found.highest, out=here)
