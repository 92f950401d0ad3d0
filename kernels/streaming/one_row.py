"""A token that is read on a cache: one query, which sees a run of keys, so that none of its scores is hidden.

The definition written out (``reference``), without what a tile of many rows needs: a step of generation makes such a
call in every layer, and there an operation of torch's costs more than its arithmetic.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from headscope.kernels.reference import pad_top
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores


def attend(scores: Scores, v: Tensor, request: Request, held: int) -> Reduced | None:
    """``request``, but for counts of queries; None where this is no such call, where it has more than ``held`` scores,
    or where a reduction is not here."""
    batch, heads, queries, keys = scores.shape
    if queries != 1 or not 0 < batch * heads * keys <= held or not scores.is_plain:
        return None
    if request.windows or request.targets is not None or request.query_rows is not None or not scores.mask.only_band:
        return None
    mask, dtype = scores.mask, scores.dtype
    lo, hi = mask.key_bounds(0, 1, keys)
    if lo == hi or not all([_is_whole(each) for each in request.columns]):
        return None
    k, v_seen = (_as(x if hi - lo == keys else x[:, :, lo:hi], dtype).flatten(0, 1) for x in (scores.k, v))
    q = _as(scores.q, dtype).reshape(k.shape[0], -1, k.shape[2])
    s = torch.baddbmm(_nothing(dtype, q.device), q, k.mT, beta=0, alpha=scores.scale)  # (batch x kv_head, group, key)
    log_p = s.log_softmax(-1)
    p = log_p.exp()

    def of_head(x: Tensor) -> Tensor:
        """(batch x kv_head, group, ...) as (batch, head, 1, ...)."""
        return x.view(batch, heads, 1, *x.shape[2:])

    result = Reduced()
    if request.output:
        result.output = _as(of_head(torch.bmm(p, v_seen)), v.dtype)
    if request.lse:
        result.lse = of_head(s.logsumexp(-1))
    if request.max:
        result.max = of_head(s.amax(-1))
    if request.entropy:
        result.entropy = of_head(torch.linalg.vecdot(p, log_p).neg_())
    if request.linear is not None:
        columns = request.linear[..., lo:hi, :].to(dtype)
        result.linear = torch.matmul(of_head(p), columns if columns.dim() == 2 else columns[:, None])
    if request.distance:
        ahead = mask.query_offset - mask.key_offset - torch.arange(lo, hi, device=p.device, dtype=dtype)
        result.distance = of_head(torch.matmul(p, ahead))
    if request.top:
        mass, index = p.topk(min(request.top, hi - lo), dim=-1)
        result.top_mass, result.top_keys = pad_top(of_head(mass), of_head(index + (lo + mask.key_offset)), request.top)
    if request.columns:
        weights = torch.nn.functional.pad(p.view(batch, heads, hi - lo), (lo, keys - hi))
        alone = len(request.columns) == 1  # no two share a tensor
        result.columns = tuple([_columns(weights if alone else weights.clone(), each) for each in request.columns])
    return result


def _is_whole(columns: Columns) -> bool:
    return columns.queries in (None, (0, 1))


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What ``baddbmm`` adds nothing of: with it the scale is no operation of its own."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _columns(weights: Tensor, want: Columns) -> ReducedColumns:
    """The sum and the maximum over one row are its weights."""
    return ReducedColumns(weights.clone() if want.sum else None, weights if want.max else None)
