"""S3-Attention's co-activation: features that the last queries and a key have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.keys.snapkv import smoothed
from headscope.interp.cache.policy import ONE_SEQUENCE, KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError

Encoder = Callable[[Tensor, int], Tensor]  # (..., d_head) and a layer -> features (..., feature)


@dataclass(frozen=True, kw_only=True)
class S3(KeyPolicy):
    """The weight of features that a key shares with the prompt's last queries, rare ones weighing more.

    Ma et al. 2026 (arXiv 2601.17702; from a summary, no code found): a sparse autoencoder of a layer's key projections
    gives z = ReLU(...) with the ``active`` largest kept, for queries too, and

        S[t] = sum_q sum_{f in F_q} 1[key t activates f] z_{q,f} IDF(f),   IDF(f) = 1 / (log(1 + freq(f)) + 1),

    freq(f) being the number of keys of the prompt that activate f. Keys and queries are those before RoPE, by head.
    Queries are the last ``window`` of the prompt, S is averaged over the query heads of a key head and smoothed by an
    average over ``kernel`` neighbours, every layer goes by its own S, and keys are kept at a budget [OURS]: their sum
    over chosen layers, their peaks and spans, and their union with BM25 are of a search in texts, not of a cache.

    Args:
        encoder: ``encoder(x, layer)`` gives features (..., feature) of vectors (..., d_head), negative ones counting as
            0; from Python alone.
        active: features of a vector that are kept (theirs: 128 of 16,384).
        window: last queries that are asked.
        kernel: keys in an average, an odd number; 1: none.
    """

    name: ClassVar[str] = "s3"
    unit: ClassVar[str] = "activation"
    source: ClassVar[str] = "Ma et al. 2026, arXiv 2601.17702 (from a summary)"
    needs: ClassVar[tuple[str, ...]] = ("rotation",)
    refused = {**ONE_SEQUENCE, "edits": "its encoder is no setting that a file could hold"}

    encoder: Encoder | None = None
    active: int = 128
    window: int = 64
    kernel: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.active, self.window, self.kernel) < 1 or self.kernel % 2 == 0:
            raise HeadscopeError(f"{self.name}: active, window and kernel must be 1 or more, and kernel odd")

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        if not callable(self.encoder):
            raise HeadscopeError(
                "s3 needs an encoder of keys, which only Python can give: S3(encoder=lambda x, layer: features)"
            )
        super().check(tokens, kept)

    def scores(self, reading: Reading) -> Tensor:
        call, key = reading.call, reading.scored
        at = reading.at.clamp(min=0)
        held = self._features(reading, key, at) > 0
        held = held & reading.keys[:, None, :, None]
        weight = 1 / (torch.log1p(held.sum(2).to(key.dtype)) + 1)  # IDF: (batch, kv_head, feature)
        asked = key.new_zeros(weight.shape)
        for b, stop in enumerate(reading.stop.tolist()):
            rows = slice(max(int(reading.start[b]), stop - self.window), stop)
            z = self._features(reading, call.query[b : b + 1, :, rows].to(key.dtype), at[b : b + 1, rows])
            asked[b] = z.sum(2).reshape(asked.shape[1], -1, asked.shape[2]).mean(1)
        return smoothed((held.to(key.dtype) @ (asked * weight)[..., None]).squeeze(-1), self.kernel)

    def _features(self, reading: Reading, x: Tensor, at: Tensor) -> Tensor:
        """The largest features of ``x`` (batch, head, token, d) at positions ``at`` (batch, token), others 0."""
        rotation = reading.rotation
        if self.encoder is None or rotation is None:
            raise HeadscopeError(f"{self.name} turns keys back and was not told how the layer turns them")
        z = self.encoder(rotation.turn(x, -rotation.angles(at)[:, None]), reading.call.layer).relu()
        if z.shape[:-1] != x.shape[:-1] or z.shape[-1] < self.active:
            raise HeadscopeError(
                f"s3: its encoder gave {tuple(z.shape)} for {tuple(x.shape)}: give (..., feature), at least "
                f"active={self.active} of them"
            )
        best = z.topk(self.active, dim=-1)
        return torch.zeros_like(z).scatter(-1, best.indices, best.values)
