"""Affine maps of heads' outputs, dimension by dimension: LoFiT's edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.head_tables import D_HEAD, TableEdit


@dataclass(frozen=True, eq=False)
class AffineHeads(TableEdit):
    """Scale and shift every dimension of the outputs z of ``heads``: z' = (1 + A) * z + v.

    LoFiT (Yin et al. 2024, arXiv 2406.01563, section 3) learns A for all heads to choose some, then v for those alone,
    from A = 0 again; an edit of one of its steps has one of the two. As in its code every position is edited, the
    prompt's and padding's too. A and v may require gradients: inside ``apply(..., grad=True)`` they get theirs.

    At ``strength`` s it is z + s (A * z + v), so that 0 is the unedited model and more than 1 goes further the same
    way. Where A and v are 0 it changes nothing. What it does not show: what A and v were fitted for; they come from
    somewhere else.

    Args:
        A: (layer, head, d_head), or (chosen head, d_head) in the order of ``heads``; None: 0.
        v: likewise.
        strength: any finite number.
    """

    _: KW_ONLY
    A: Tensor | None = None
    v: Tensor | None = None

    source: ClassVar[str] = "LoFiT, arXiv 2406.01563"
    unit: ClassVar[str] = "share of the fitted change"
    strengths: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"A": (D_HEAD,), "v": (D_HEAD,)}
    added: ClassVar[tuple[str, ...]] = ("v",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.A is None and self.v is None:
            raise HeadscopeError("AffineHeads needs A (what it scales by, less 1), v (what it adds) or both")

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """(1 + A) * z + v."""
        if self.A is not None:
            z = (1 + self.table("A", call)[None, :, None]) * z
        return z if self.v is None else z + self.table("v", call)[None, :, None]

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """The diagonal 1 + A, and v."""
        none = torch.zeros(len(self._held[layer]), width, dtype=torch.float64)
        a, b = (
            none if x is None else self.rows_of(n, layer).detach().double() for n, x in (("A", self.A), ("v", self.v))
        )
        return torch.diag_embed(1 + a), b
