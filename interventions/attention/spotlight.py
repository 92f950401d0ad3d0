"""SpotLight: a span's keys get a bias wherever they hold less than a target share of the attention."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.score_edit import SpanEdit
from headscope.kernels.request import Request


@dataclass(frozen=True, eq=False)
class SpotLight(SpanEdit):
    """Raise the attention to a span where it holds less than ``target`` of it.

    With psi the mass on the span's keys, their scores gain B = log(target / psi) where psi < target, and nothing
    elsewhere. The row is normalised afterwards, so that the span then holds target / (1 + target - psi): less than the
    target, and much less for a large one (0.50 from psi near 0 and a target near 1).

    What it knows of the method: the authors' implementation (IBM, ``altk/pre_llm/spotlight/spotlight.py`` of the agent
    lifecycle toolkit), not the paper's text. There psi is *one number* an example and layer, the mean over all heads
    and all query rows of the pass (``over="layer"``). Reading a prompt it therefore depends on rows that come later and
    on those before the span, and in decoding on one row alone: a text read at once and one read in pieces differ.
    ``over="row"`` (the default, [OURS]) asks every head and row by itself. What also differs: their code adds 1e-10 to
    weights before the logarithm, so that hidden keys, later ones too, get a trace of attention; here hidden stays
    hidden. They count padded rows, we do not.

    A row that sees nothing of the span, with psi = 0, or with psi of the target and more, is as it was; where that is
    so in all of them the model runs as without it, and nothing is said. Reaching a share of attention does not show
    that what is there is followed.

    Args:
        target: the share of attention below which the span is raised, above 0 and below 1.
        over: ``"row"``: psi of each head and row. ``"layer"``: one psi an example, the mean over the heads and rows
            that are meant.
        strength: the factor on B.
    """

    _: KW_ONLY
    target: float = 0.2
    over: Literal["row", "layer"] = "row"

    source: ClassVar[str] = "Venkateswaran & Contractor 2025, arXiv 2505.12025"
    unit: ClassVar[str] = "share of attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, bool) or not isinstance(self.target, int | float) or not 0 < self.target < 1:
            raise HeadscopeError(f"SpotLight: target must be above 0 and below 1, not {self.target!r}")
        if self.over not in ("row", "layer"):
            raise HeadscopeError(f"SpotLight: over must be 'row' or 'layer', not {self.over!r}")

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """One pass for psi, and B on the span's keys."""
        psi = call.with_(redistribution=None).attend(Request(output=False, linear=keys[..., None])).linear
        assert psi is not None
        psi = psi[..., 0]  # (batch, head, query)
        if self.over == "layer":
            psi = _mean(call, psi, mine)
        low = (psi > 0) & (psi < self.target)
        bias = torch.where(low, self.strength * (self.target / torch.where(low, psi, 1.0)).log(), 0.0)
        if self.over == "layer":
            return self.add_to_keys(call, mine, torch.where(keys, bias[:, 0], 0.0))
        return self.add(call, mine, rows=bias, keys=keys[:, None])


def _mean(call: AttentionCall, psi: Tensor, mine: Tensor) -> Tensor:
    """psi over the heads and the real rows that are meant: (batch, 1, 1)."""
    real = None if call.cross else call.mask.query_is_real(torch.arange(psi.shape[2], device=psi.device))
    counted = (mine if real is None else mine & real[:, None]).expand_as(psi)
    total = torch.where(counted, psi, 0.0).sum((1, 2), keepdim=True)
    return total / counted.sum((1, 2), keepdim=True).clamp(min=1)
