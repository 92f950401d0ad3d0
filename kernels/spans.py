"""What a head wrote from each named span of keys: sum over the span of p_ij v_j.

1. Attention over a span's keys alone gives o_S = sum_S exp(s_ij - lse_S) v_j and lse_S.
2. p_ij = exp(s_ij - lse_i), so the span's share of the output is exp(lse_S - lse) o_S, and its mass exp(lse_S - lse).
3. A slice of the keys is a call whose mask has a larger key offset: no kernel is needed, and spans that partition the
   keys cost one pass together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request

Span = tuple[int, int]


class SpanOutputs(NamedTuple):
    """``output`` (batch, head, query, span, d_value) in the value's dtype; ``mass`` (batch, head, query, span)."""

    output: Tensor
    mass: Tensor


@torch.no_grad()
def span_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[Span] | Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    engine: attention.Engine = "auto",
) -> SpanOutputs:
    """The output split by span; ``spans`` are key *indices* ``(start, stop)``, or a tensor (batch, span, 2).

    ``q`` (batch, head, query, d), ``k``, ``v`` (batch, kv_head, key, ·). ``lse`` (batch, head, query), if known, saves
    a pass. Raises ValueError for a span outside the keys.
    """
    options: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
    if lse is None:
        request = Request(output=False, lse=True)
        lse = attention.attend(q, k, v, sinks=sinks, request=request, engine=engine, **options).lse
    assert lse is not None
    if isinstance(spans, Tensor):
        rows = []
        for b in range(q.shape[0]):
            one = slice(b, b + 1)
            own = bias if bias is None or bias.shape[0] == 1 else bias[one]
            here = {**options, "mask": mask.select_batch(b, b + 1), "bias": own}
            named = [(int(x), int(y)) for x, y in spans[b if spans.shape[0] > 1 else 0]]
            rows.append(_spans(q[one], k[one], v[one], lse[one], named, engine, here))
        return SpanOutputs(*(torch.cat(x) for x in zip(*rows, strict=True)))
    return _spans(q, k, v, lse, spans, engine, options)


def _spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    spans: Sequence[Span],
    engine: attention.Engine,
    options: dict[str, Any],
) -> SpanOutputs:
    mask, bias = options["mask"], options["bias"]
    outputs, masses = [], []
    for start, stop in spans:
        if not 0 <= start <= stop <= k.shape[2]:
            raise ValueError(f"span {start}:{stop} lies outside the {k.shape[2]} keys")
        here = {
            **options,
            "mask": replace(mask, key_offset=mask.key_offset + start),
            "bias": None if bias is None else bias[..., start:stop],
        }
        got = attention.attend(
            q, k[:, :, start:stop], v[:, :, start:stop], request=Request(lse=True), engine=engine, **here
        )
        assert got.lse is not None and got.output is not None
        mass = torch.exp(got.lse - lse).masked_fill(got.lse == -torch.inf, 0.0)
        masses.append(mass)
        outputs.append((got.output * mass[..., None]).to(v.dtype))
    if not spans:
        return SpanOutputs(v.new_zeros(*q.shape[:3], 0, v.shape[3]), lse.new_zeros(*q.shape[:3], 0))
    return SpanOutputs(torch.stack(outputs, 3), torch.stack(masses, -1))
