"""Redistribution onto an image: heads that look at it take from sink tokens what its other tokens get."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.stream_sinks import StreamSinks
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Request

Meaning = Literal["paper", "code"]


@dataclass(frozen=True, eq=False)
class RedistributeSinks(StreamSinks):
    """Heads that look at ``span`` move a share of what sink tokens get onto the span's other tokens.

    VAR, Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321;
    src/logic/logic.py; the formulas agree with its classes to 6e-17). Token t is a sink of layer l where phi = max over
    ``dimensions`` of |x_d| / rms(x), of the stream x that enters l (edited layers below included), is above ``tau``.
    A row and head with S = the mass on the span are chosen where S >= ``least`` and the share of S that is not on sinks
    is at least ``rho``. There every sink (in the span or not) loses the share ``share`` of its weight, and the span's
    other tokens get it in proportion to theirs. Rows up to the span's end are left alone, as is every head of a layer
    that has no sink in the span. Sinks are those of the prompt: generated tokens are none.

    The code means the opposite by both numbers, ``meaning="code"``: there ``rho`` bounds the share *on* sinks from
    above, (its divisor S + 1e-6 a token), and ``share`` is what sinks *keep*. The paper leaves the last layer out, the
    code edits it by mistake: ``layers`` says. The code also looks for sinks in the first prompt of a process alone, and
    uses the 7B model's dimensions for the 13B one; here neither. A row without mass on the span's other tokens (NaN in
    the code) stays as it is.

    Dimensions and tau are those of LLaVA-1.5-7B unless given; ``found_in(lm)`` finds them for any model. phi cannot
    exceed sqrt(d_model), so a tau above it is refused, and a block in which nothing qualifies says what was missing.

    What it does not show: that sinks hold no information; that the moved mass helps (the paper: heads without
    selection collapse).

    Args:
        rho, share, least: which heads and how much, see above. ``strength`` s moves s times the share.
        meaning: ``"paper"`` or ``"code"``, what ``rho`` and ``share`` mean.
    """

    _: KW_ONLY
    rho: float = 0.5
    share: float = 0.6
    least: float = 0.2
    meaning: Meaning = "paper"

    source: ClassVar[str] = "arXiv 2503.03321"
    unit: ClassVar[str] = "share of sinks' mass moved"

    def _check_numbers(self) -> None:
        super()._check_numbers()
        for name, low in (("rho", self.rho), ("share", self.share), ("least", self.least)):
            if not 0.0 <= low <= 1.0:
                raise HeadscopeError(f"RedistributeSinks: {name} must be between 0 and 1, not {low!r}")
        if self.meaning not in ("paper", "code"):
            raise HeadscopeError(f"RedistributeSinks: meaning must be 'paper' or 'code', not {self.meaning!r}")

    @property
    def moved(self) -> float:
        """The share of a sink's weight that is moved."""
        return self.strength * (self.share if self.meaning == "paper" else 1.0 - self.share)

    @property
    def neutral(self) -> bool:
        """A share of nothing, too, changes nothing."""
        return self.moved == 0

    @property
    def untouched(self) -> str:
        """No head looked at the span."""
        return f"no head puts {self.least:g} of a row on the span, with its sinks' share as rho={self.rho:g} asks"

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Mass moved in the rows and heads that look at the span."""
        sinks, span, mine, _ = self.behind(call, mine)
        inside = sinks & span
        if not bool(mine.any()):
            return call
        columns = torch.stack([span.expand_as(inside), inside], -1)
        mass = call.attend(Request(output=False, linear=columns)).linear
        assert mass is not None
        mine = mine & self._looks(mass[..., 0], mass[..., 1], span.sum(-1)[:, None, None])
        self.note(mine)
        if not bool(mine.any()):
            return call
        keep = call.either(mine, 1.0 - self.moved, 1.0)
        return call.with_redistribution(Redistribution(sinks[:, None], keep, onto=span[:, None]))

    def _looks(self, mass: Tensor, on_sinks: Tensor, count: Tensor) -> Tensor:
        """Which rows and heads look at the span."""
        if self.meaning == "code":
            right = on_sinks / (mass + 1e-6 * count) <= self.rho
        else:
            right = mass - on_sinks >= self.rho * mass
        return right & (mass >= self.least) & (mass > 0)
