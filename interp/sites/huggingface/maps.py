"""The weights that a forward pass is asked for with ``output_attentions=True``, whatever the implementation."""

from __future__ import annotations

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError

LIMIT = 1 << 28  # numbers of one layer's map: a gibibyte in float32, 16 heads on 4,096 tokens


def map_of(call: AttentionCall) -> Tensor:
    """The pattern (batch, head, query, key) of a call after all edits, in the precision of its queries.

    Raises:
        HeadscopeError: it is larger than ``LIMIT``.
    """
    batch, heads, queries, _ = call.query.shape
    size = batch * heads * queries * call.key.shape[2]
    if size > LIMIT:
        raise HeadscopeError(
            f"output_attentions=True asks for maps of {size * 4 / 2**20:,.0f} MiB a layer: record statistics instead, "
            "or ask for one head with head_pattern"
        )
    return call.pattern().to(call.query.dtype)
