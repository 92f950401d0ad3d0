"""How long the keys and the values of a head are: (example, layer, head, key)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.statistics.base import CallStatistic, KeyStatistic
from headscope.kernels.request import Reduced


@dataclass(frozen=True)
class _Norm(CallStatistic, KeyStatistic):
    """L2 norms of vectors of the key/value heads, which their query heads share."""

    unit: ClassVar[str] = "activation"
    source: ClassVar[str] = "arXiv 2410.10781"

    @staticmethod
    def vectors(call: AttentionCall) -> Tensor:
        """Whose norms are wanted: (batch, kv_head, key, width)."""
        raise NotImplementedError

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        x = self.vectors(call)
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        return {self.name: norms.repeat_interleave(call.query.shape[1] // x.shape[1], dim=1)}

    def merge(self, part: str, held: Tensor, value: Tensor) -> Tensor:
        """A key has the same norm in every pass that holds it."""
        return torch.maximum(held, value)


@dataclass(frozen=True)
class KeyNorm(_Norm):
    """L2 norm of each key, after position embedding and any normalisation: (example, layer, head, key). Query heads
    that share a key head have the same norms."""

    name: ClassVar[str] = "key_norm"
    vectors = staticmethod(lambda call: call.key)


@dataclass(frozen=True)
class ValueNorm(_Norm):
    """L2 norm of each value: (example, layer, head, key). Query heads that share a value head have the same norms."""

    name: ClassVar[str] = "value_norm"
    vectors = staticmethod(lambda call: call.value)
