"""Head offsets: push what heads write along a direction (activation steering, head by head)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.head_tables import D_HEAD, TableEdit
from headscope.interventions.phases import Rows, as_mask, is_none, prompt_stop


@dataclass(frozen=True, eq=False)
class AddToHeads(TableEdit):
    """Add a vector to the outputs z of ``heads``: z' = z + strength * sigma * vector.

    This is ITI's edit (Li et al. 2023, arXiv 2306.03341, section 3.3): ``strength`` is its alpha (15 there), the vector
    a direction of length 1 in the space of z, sigma the standard deviation of z along it. From a probe:
    ``AddToHeads(result.scores.top(48), d.mass_mean, sigma=d.mass_mean_sigma, strength=15)`` with the tensors of
    ``result.directions``, or ``headscope intervene add-to-heads --set vectors=FILE.safetensors:mass_mean``.

    Which rows: ITI's generation shifts the row that chooses a token, ``during="answer"``. Their released pyvene path
    shifts position -1 of each forward pass only, which cannot move log-probabilities of a given answer; their legacy
    code shifts every row from the question's end plus 4 tokens on (``during="decode", after=4``, the question being the
    prompt), which can. Their ``edit_weight.py`` bakes the offset into the output projection's bias without multiplying
    it by W_O; ``headscope export`` multiplies.

    A vector of zeros changes nothing. What it does not show: that the model holds what the direction was found for;
    ``evaluate`` compares with random directions of the same length in the same heads, and with other heads.

    Args:
        vectors: (layer, head, d_head), or (chosen head, d_head) in the order of ``heads``.
        sigma: numbers that multiply the vectors: (layer, head), or (chosen head,). None: 1.
        after: with ``during="decode"``: leave the first so many rows after the prompt as they are.
        strength: alpha, any finite number: 0 is the unedited model, negative ones push the other way.
    """

    vectors: Tensor = field()
    _: KW_ONLY
    sigma: Tensor | None = None
    after: int = 0

    source: ClassVar[str] = "ITI, arXiv 2306.03341"
    unit: ClassVar[str] = "alpha: sigmas along the direction"
    strengths: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"vectors": (D_HEAD,), "sigma": ()}
    added: ClassVar[tuple[str, ...]] = ("vectors",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.after, bool) or not isinstance(self.after, int) or self.after < 0:
            raise HeadscopeError(f"AddToHeads: after counts rows, 0 or more; got {self.after!r}")
        if self.after and self.during != "decode":
            raise HeadscopeError("AddToHeads: after counts from the prompt's end; give during='decode' with it")

    def rows(self, call: AttentionCall) -> Rows:
        """Those of the phase, less the first ``after``."""
        rows = super().rows(call)
        if not self.after or is_none(rows):
            return rows
        at = torch.arange(call.query.shape[2], device=call.query.device)[None] + call.mask.query_offset
        return as_mask(rows, call) & (at >= prompt_stop(call, "after")[:, None] + self.after)

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """z + sigma * vector."""
        moved = self.table("vectors", call)
        if self.sigma is not None:
            moved = moved * self.table("sigma", call)[:, None]
        return z + moved[None, :, None]

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """The identity, and the offset."""
        b = self.rows_of("vectors", layer).detach().double()
        if self.sigma is not None:
            b = b * self.rows_of("sigma", layer).detach().double()[:, None]
        return torch.eye(width, dtype=torch.float64).repeat(len(b), 1, 1), b
