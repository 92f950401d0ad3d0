"""Attention knockout: chosen queries no longer see chosen keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interventions.attention.score_edit import SpanEdit


@dataclass(frozen=True, eq=False)
class KnockOut(SpanEdit):
    """Cut attention from the queries of ``positions`` to the keys of ``span``, in ``heads``, ``layers`` or everywhere.

    s_qk = -inf for those pairs before softmax, so that the row's other keys take up the mass in proportion: the
    attention knockout of Geva et al. 2023, Section 5, which blocks in all heads of a window of layers around each
    layer (``layers=range(l - 4, l + 5)`` is theirs of 9 in GPT-2). Without ``positions`` all queries are meant.

    What differs from the authors' code: it adds the lowest finite number, so that a row whose every key is cut spreads
    over all of the text, later tokens too. Here such a row reads nothing and the head writes 0 there. Theirs masks a
    whole forward pass; here the cut holds in cached generation too.

    A drop without an edge shows that something the model uses passes there, not what. No drop shows little: other edges
    may do the same.

    Args:
        span: the keys that are hidden.
        strength: 1 takes the keys away, s < 1 leaves 1 - s of their weight before renormalisation.
    """

    source: ClassVar[str] = "Geva et al. 2023, arXiv 2304.14767"
    unit: ClassVar[str] = "share of a key's weight removed"

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """-inf, or the logarithm of what is left."""
        bias = -math.inf if self.strength == 1 else math.log1p(-self.strength)
        return self.add_to_keys(call, mine, call.either(keys, bias, 0.0))
