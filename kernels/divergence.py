"""How far two patterns over the same keys lie apart, query by query: two runs, or two heads.

Per query, over its visible keys, with log p and log r from each side's lse (nats):

1. KL(p || r) = sum p (log p - log r); no logarithm is taken of a weight, so none underflows;
2. log m = logaddexp(log p, log r) - log 2; JS = (sum p (log p - log m) + sum r (log r - log m)) / 2, at most log 2;
3. TV = sum |p - r| / 2; cosine = sum p r / sqrt(sum p^2 sum r^2), of rows divided by their sums.

Definition: ``dense``. With sink logits p and r sum to less than one and the sums run over the keys alone. KL is
infinite where r has no key that p sees, however small p is there. An empty row has divergence 0 and cosine 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.fallback import falls_back
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import log_weights


class Divergence(NamedTuple):
    """Per query (batch, head, query): Jensen-Shannon and KL in nats, total variation and cosine in [0, 1]."""

    js: Tensor
    kl: Tensor
    tv: Tensor
    cosine: Tensor


def dense(log_p: Tensor, log_r: Tensor) -> Divergence:
    """The definition, from two log patterns (..., key) with -inf at hidden keys."""
    p, r = log_p.exp(), log_r.exp()
    log_m = torch.logaddexp(log_p, log_r) - math.log(2.0)

    def relative(x: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
        apart = torch.where(log_y == -torch.inf, torch.inf, x * (log_x - log_y))  # x itself may be too small a number
        return torch.where(log_x == -torch.inf, 0.0, apart).sum(-1)

    js = (relative(p, log_p, log_m) + relative(r, log_r, log_m)) / 2
    u, v = (_whole(x).exp() for x in (log_p, log_r))
    norm = (u.square().sum(-1) * v.square().sum(-1)).sqrt()
    cosine = (u * v).sum(-1) / torch.where(norm > 0, norm, 1.0)
    return Divergence(js, relative(p, log_p, log_r), (p - r).abs().sum(-1) / 2, cosine)


def _whole(log_p: Tensor) -> Tensor:
    """A log pattern whose rows sum to one: squares of what a sink logit leaves may be too small to be numbers."""
    norm = torch.logsumexp(log_p, -1)
    return log_p - norm.masked_fill(norm == -torch.inf, 0.0)[..., None]


def _lse(scores: Scores, engine: attention.Engine) -> Tensor:
    """The logsumexp of every query's scores over its keys alone (batch, head, query)."""
    request = Request(output=False, lse=True)
    lse = attention.attend(replace(scores, sinks=None), scores.k, request=request, engine=engine).lse
    assert lse is not None
    return lse


def _with_sinks(scores: Scores, lse: Tensor) -> Tensor:
    if scores.sinks is None:
        return lse
    both = torch.logaddexp(lse, scores.sinks.to(lse.dtype)[None, :, None])
    return both.masked_fill(lse == -torch.inf, -torch.inf)


@torch.no_grad()
def divergence(first: Scores, second: Scores, *, engine: attention.Engine = "auto") -> Divergence:
    """Distances between two patterns of the same queries, heads and keys: two runs, two heads, or with and without an
    edit.

    They may differ in d_head and kv_head. To compare heads of one call, index q and k: ``q[:, a], k[:, a_kv]``. Raises
    ValueError where queries, heads or keys differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"patterns of different (batch, head, query, key): {first.shape} and {second.shape}")
    norms = [_lse(one, engine) for one in (first, second)]
    wholes = [_with_sinks(one, norm) for one, norm in zip((first, second), norms, strict=True)]
    if _alike(first, second) and attention.uses_triton(engine, first):
        from headscope.kernels.triton.divergence import distances

        options: dict[str, Any] = {"mask": first.mask, "scale": first.scale, "softcap": first.softcap}
        lost = None
        if first.sinks is not None or second.sinks is not None:
            lost = [torch.where(x == -torch.inf, 0.0, x - norm) for x, norm in zip(wholes, norms, strict=True)]
        with falls_back("the streaming engine"):
            return Divergence(*distances((first.q, first.k), (second.q, second.k), norms, lost, **options))
    tiles = [
        log_weights(one, norm, beside=other.mask)
        for one, other, norm in ((first, second, wholes[0]), (second, first, wholes[1]))
    ]
    parts = [dense(p.log_p, r.log_p) for p, r in zip(*tiles, strict=True)]
    return Divergence(*(torch.cat(x, -1) for x in zip(*parts, strict=True)))


def _alike(first: Scores, second: Scores) -> bool:
    """Whether both are made the same way, from q and k of one shape and type, without a bias or an edit."""
    q, u = first.q, second.q
    same = q.shape[3] == u.shape[3] and q.dtype == u.dtype and first.k.shape[1] == second.k.shape[1]
    plain = all(x is None for side in (first, second) for x in (side.bias, side.edit))
    numbers = (first.scale, first.softcap) == (second.scale, second.softcap)
    return same and plain and numbers and first.mask.alike(second.mask)


def output_distance(first: Tensor, second: Tensor) -> Tensor:
    """L2 distance of two outputs (batch, head, query, d_value), per query in float32: (batch, head, query)."""
    apart: Tensor = torch.linalg.vector_norm(first.float() - second.float(), dim=-1)
    return apart
