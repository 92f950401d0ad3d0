"""Attention times its gradient, A * dL/dA, summed over queries or keys without either of the two maps.

1. z_i = sum_j A_ij v_j, so dL/dA_ij = dL/dz_i . v_j: the gradient of a weight needs the output's gradient and the
   values only, whatever made the scores (softcap, sinks, bias, edit, mask).
2. With lse known, A_ij = exp(s_ij - lse_i): tiles of w = A * dL/dA follow from a tile of scores and one product more.
3. Signed sums over a span of keys are dL/dz_i . (what the head wrote from the span); absolute ones need the tiles.
4. Rows whose gradient is 0 add nothing and are not read: of the last layer, under a loss at the last token, one row is.

Definition: ``dense``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels import attention, reference
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import log_weights


@dataclass(frozen=True, eq=False)
class Saliency:
    """Sums of w = A * dL/dA (batch, head, query, key), at least float32.

    ``keys``, ``signed_keys`` (batch, head, key): sum_i |w_ij| and sum_i w_ij. ``spans``, ``signed_spans`` (batch, head,
    query, span): sum over the span of |w_ij| and of w_ij. ``flow`` (batch, key): sum_i |sum_h w_ij|. Sums over queries
    are over the chosen ``rows``; sums over keys are of every query.
    """

    keys: Tensor
    signed_keys: Tensor
    flow: Tensor
    spans: Tensor
    signed_spans: Tensor


def dense(scores: Scores, v: Tensor, gradient: Tensor) -> Tensor:
    """The definition: w (batch, head, query, key)."""
    return reference.pattern(scores) * slopes(gradient, v)


def slopes(gradient: Tensor, v: Tensor) -> Tensor:
    """dL/dA (batch, head, row, key) of ``gradient`` = dL/dz (batch, head, row, d_value) and values ``v`` (batch,
    kv_head, key, d_value)."""
    batch, heads, rows, width = gradient.shape
    shared = gradient.reshape(batch, v.shape[1], -1, width)  # (batch, kv_head, query head of it x row, d_value)
    found: Tensor = (shared @ v.to(gradient.dtype).transpose(-1, -2)).view(batch, heads, rows, -1)
    return found


@torch.no_grad()
def saliency(
    scores: Scores,
    v: Tensor,
    gradient: Tensor,
    *,
    spans: Tensor | None = None,
    rows: Tensor | None = None,
    engine: attention.Engine = "auto",
) -> Saliency:
    """The sums of ``Saliency``; memory is that of a few rows of the map at a time.

    Args:
        scores: of the call.
        v: values (batch, kv_head, key, d_value).
        gradient: dL/dz (batch, head, query, d_value).
        spans: which keys each holds, bool (batch or 1, key, span); None: there are none.
        rows: which queries the sums over queries are over, bool (batch or 1, query); None: all.

    Raises:
        ValueError: shapes that do not belong together.
    """
    batch, heads, queries, count = scores.shape
    scores.check(v)
    if gradient.shape != (batch, heads, queries, v.shape[3]):
        raise ValueError(f"the gradient must be {(batch, heads, queries, v.shape[3])}; got {tuple(gradient.shape)}")
    dtype = torch.promote_types(gradient.dtype, scores.dtype)
    held = torch.zeros(1, count, 0, device=v.device) if spans is None else spans
    held = held.to(v.device, dtype).expand(batch, -1, -1)
    keys, signed, flow = (
        v.new_zeros(*shape, count, dtype=dtype) for shape in ((batch, heads), (batch, heads), (batch,))
    )
    by_span, signed_span = (v.new_zeros(batch, heads, queries, held.shape[-1], dtype=dtype) for _ in range(2))
    part = _touched(gradient)
    if part.start < part.stop:
        some, values = scores.rows(part), v.to(dtype)
        lse = attention.attend(some, some.k, request=Request(output=False, lse=True), engine=engine).lse
        assert lse is not None
        for at, to, log_p in log_weights(some, lse.to(dtype)):
            here = slice(part.start + at.start, part.start + at.stop)
            w = log_p.exp_().mul_(slopes(gradient[:, :, here].to(dtype), values[:, :, to]))
            size = w.abs()
            by_span[:, :, here], signed_span[:, :, here] = size @ held[:, None, to], w @ held[:, None, to]
            if rows is not None:
                chosen = rows[:, here].to(w)[:, None, :, None]
                w, size = w * chosen, size * chosen
            keys[..., to] += size.sum(2)
            signed[..., to] += w.sum(2)
            flow[..., to] += w.sum(1).abs_().sum(1)
    return Saliency(keys, signed, flow, by_span, signed_span)


def _touched(gradient: Tensor) -> slice:
    """From the first to the last row with a gradient."""
    some = gradient.ne(0).any(-1).any(1).any(0).nonzero().flatten()
    return slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, 0)
