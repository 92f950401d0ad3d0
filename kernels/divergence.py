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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.fallback import falls_back
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request
from headscope.kernels.score_edits import ScoreEdit
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


class Side(NamedTuple):
    """One of two patterns: what its scores are made of, as in ``attention.attend``."""

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    edit: ScoreEdit | None = None

    def lse(self, engine: attention.Engine) -> Tensor:
        """The logsumexp of every query's scores over its keys alone (batch, head, query)."""
        request = Request(output=False, lse=True)
        got = attention.attend(self.q, self.k, self.k, request=request, engine=engine, **self.scores())
        assert got.lse is not None
        return got.lse

    def whole(self, lse: Tensor) -> Tensor:
        """``lse`` with the sink logits."""
        if self.sinks is None:
            return lse
        both = torch.logaddexp(lse, self.sinks.to(lse.dtype)[None, :, None])
        return both.masked_fill(lse == -torch.inf, -torch.inf)

    def scores(self) -> dict[str, Any]:
        """What makes the scores of q and k."""
        return {name: getattr(self, name) for name in ("mask", "scale", "softcap", "bias", "edit")}


@torch.no_grad()
def divergence(first: Side, second: Side, *, engine: attention.Engine = "auto") -> Divergence:
    """Distances between two patterns of the same queries, heads and keys: two runs, two heads, or with and without an
    edit.

    Their q (batch, head, query, d) and k (batch, kv_head, key, d) may differ in d and kv_head. To compare heads of one
    call, index them: ``q[:, a], k[:, a_kv]``. Raises ValueError where queries, heads or keys differ.
    """
    shapes = [(*x.q.shape[:3], x.k.shape[2]) for x in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"patterns of different (batch, head, query, key): {shapes[0]} and {shapes[1]}")
    norms = [side.lse(engine) for side in (first, second)]
    if _alike(first, second) and attention.uses_triton(engine, first.q, first.k, first.mask):
        from headscope.kernels.triton.divergence import distances

        options: dict[str, Any] = {"mask": first.mask, "scale": first.scale, "softcap": first.softcap}
        wholes = [side.whole(norm) for side, norm in zip((first, second), norms, strict=True)]
        lost = [torch.where(x == -torch.inf, 0.0, x - norm) for x, norm in zip(wholes, norms, strict=True)]
        with falls_back("the streaming engine"):
            return Divergence(*distances((first.q, first.k), (second.q, second.k), norms, lost, **options))
    tiles = [
        log_weights(x.q, x.k, x.whole(norm), beside=other.mask, **x.scores())
        for x, other, norm in ((first, second, norms[0]), (second, first, norms[1]))
    ]
    parts = [dense(p.log_p, r.log_p) for p, r in zip(*tiles, strict=True)]
    return Divergence(*(torch.cat(x, -1) for x in zip(*parts, strict=True)))


def _alike(first: Side, second: Side) -> bool:
    """Whether both are made the same way, from q and k of one shape and type, without a bias or an edit."""
    q, u = first.q, second.q
    same = q.shape[3] == u.shape[3] and q.dtype == u.dtype and first.k.shape[1] == second.k.shape[1]
    plain = all(x is None for side in (first, second) for x in (side.bias, side.edit))
    scores = (first.scale, first.softcap) == (second.scale, second.softcap)
    return same and plain and scores and first.mask.alike(second.mask)


def output_distance(first: Tensor, second: Tensor) -> Tensor:
    """L2 distance of two outputs (batch, head, query, d_value), per query in float32: (batch, head, query)."""
    apart: Tensor = torch.linalg.vector_norm(first.float() - second.float(), dim=-1)
    return apart
