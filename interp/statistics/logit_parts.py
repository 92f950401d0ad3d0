"""Why a query scores one key higher than the others, by angle or by length: (example, layer, head, query)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.statistics.base import GAPS, PACKED, CallStatistic
from headscope.kernels.request import Reduced

TILE = 1 << 22  # scores that are held at a time


@dataclass(frozen=True)
class LogitParts(CallStatistic):
    """How far the score of one key lies above a query's other visible keys on average, as the sum of two parts in nats:
    ``angle_gap`` and ``norm_gap`` (example, layer, head, query); NaN where the query sees no other key, or not this.

    With q.k = |q| |k| cos(q, k) (the decomposition of Gu et al. 2024, arXiv 2410.10781), the difference from a key j is

        |q| (|k| c - |k_j| c_j) = |q| (c - c_j) (|k| + |k_j|) / 2  +  |q| (|k| - |k_j|) (c + c_j) / 2,

    what the angles make of it at the mean length, and the lengths at the mean angle: each part is 0 where all angles,
    or all lengths, are alike, and they sum to the whole exactly. [OURS]: the paper shows lengths and cosines, no sum.
    Scores are q.k times the layer's scale, after position embedding; softcap, bias and edits are not in them.

    ``key`` is the position of the key, from each example's first token.
    """

    key: int = 0
    name: ClassVar[str] = "logit_parts"
    unit: ClassVar[str] = "nats"
    units: ClassVar[Mapping[str, str]] = {"angle_gap": "nats", "norm_gap": "nats"}
    source: ClassVar[str] = "arXiv 2410.10781"
    refused: ClassVar[Mapping[str, str]] = {
        **GAPS,
        **PACKED,
        "cross-attention": "positions would count in the other sequence",
        "cache": "a rotated key may have left the cache",
    }

    @property
    def variables(self) -> tuple[str, ...]:
        return ("angle_gap", "norm_gap")

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """Tile by tile: the pattern's size is never held."""
        wide = torch.promote_types(call.query.dtype, torch.float32)
        at = torch.arange(call.query.shape[2], device=call.query.device) if rows is None else rows
        k = call.key.to(wide)
        parts = []
        for some in torch.split(at, max(1, TILE // (call.query.shape[0] * call.query.shape[1] * k.shape[2]))):
            parts.append(self._tile(call, call.query[:, :, some].to(wide) * call.scale, k, some))
        angle, norm = (torch.cat(one, dim=2) for one in zip(*parts, strict=True))
        return {"angle_gap": angle, "norm_gap": norm}

    def _tile(self, call: AttentionCall, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts (batch, head, row) of some rows."""
        batch, heads, count, width = q.shape
        keys = torch.arange(k.shape[2], device=q.device)
        scores = q.view(batch, k.shape[1], -1, width) @ k.transpose(2, 3)  # heads of a group side by side
        scores = scores.view(batch, heads, count, -1)
        q_norm = q.norm(dim=-1)[..., None].clamp(min=1e-30)
        k_norm = k.norm(dim=-1).repeat_interleave(heads // k.shape[1], 1)[:, :, None].clamp(min=1e-30)
        cosine = scores / (q_norm * k_norm)
        seen = call.mask.tile(rows, keys, torch.arange(heads, device=q.device))
        seen = torch.ones(1, dtype=torch.bool, device=q.device) if seen is None else seen
        seen = seen.expand(batch, heads, count, -1) if seen.dim() == 4 else seen.expand_as(scores)
        start = torch.zeros(1, dtype=torch.long, device=q.device) if call.mask.start is None else call.mask.start
        this = (keys[None] == (start + self.key - call.mask.key_offset)[:, None])[:, None, None].expand_as(scores)

        def of_this(x: Tensor) -> Tensor:
            return torch.where(this, x, 0.0).sum(-1, keepdim=True)

        length, c = of_this(k_norm.expand_as(scores)), of_this(cosine)
        other = seen & ~this
        usable = (seen & this).any(-1) & other.any(-1)

        def mean(x: Tensor) -> Tensor:
            total = torch.where(other, x, 0.0).sum(-1) / other.sum(-1).clamp(min=1)
            return torch.where(usable, total, torch.nan)

        angle = mean(q_norm * (c - cosine) * (length + k_norm) / 2)
        return angle, mean(q_norm * (length - k_norm) * (c + cosine) / 2)
