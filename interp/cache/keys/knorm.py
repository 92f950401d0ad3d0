"""Knorm: short keys are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Knorm(KeyPolicy):
    """Minus the L2 norm of a key, after position embedding: keys of small norm tend to be looked at.

    Devoto et al. 2024 (arXiv 2406.11430), as in kvpress. No query is read, so that it costs nothing. Sinks have short
    keys in most models; where they have not, it drops them, and the loss is large.
    """

    name: ClassVar[str] = "knorm"
    unit: ClassVar[str] = "activation"
    source: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430; NVIDIA/kvpress @ 8bb29b9c"

    def scores(self, reading: Reading) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(reading.scored, dim=-1)
        return -length
