"""TOVA: what the last query looks at, in all heads of the layer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading


@dataclass(frozen=True, kw_only=True)
class TOVA(KeyPolicy):
    """Attention of the prompt's last query, averaged over all heads of the layer: one set of keys for all of them.

    kvpress's ``tova_press.py:45-61`` (@ 8bb29b9c), the last token always kept. What differs from Oren et al. 2024
    (arXiv 2401.06104), who drop one key at every step by the newest query: here, as in kvpress, once, when the prompt
    was read.
    """

    name: ClassVar[str] = "tova"
    unit: ClassVar[str] = "mass"
    source: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104; NVIDIA/kvpress @ 8bb29b9c"

    def scores(self, reading: Reading) -> Tensor:
        return reading.received_in_prompt(1).mean(1, keepdim=True)

    def always(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        sink, recent = super().always(kept)
        return sink, recent.clamp(min=1)
