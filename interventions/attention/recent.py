"""Recent-token boost: what was just written gets more attention while the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary
from headscope.interventions.attention.gradient import require_no_gradient
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.interventions.attention.score_edit import weight
from headscope.interventions.phases import prompt_stop
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Request
from headscope.kernels.score_edits import ScoreEdit

Previous = Literal["output", "all"]


@dataclass(frozen=True, eq=False)
class BoostRecent(PatternEdit):
    """Multiply the weights of the last ``window`` output tokens before a row's own by 1 + ``beta``.

    LocoRE of Zhang et al. 2026, "Hallucination Begins Where Saliency Drops" (arXiv 2601.20279): post-softmax, gamma_j =
    1 + beta 1[distance to j <= w_s] for previous output positions j. The authors' code does not hold it, and the paper
    does not say w_s, the layers, or whether rows are renormalised. [OURS]: distances 1 to ``window`` = 10, all layers
    and heads, no renormalisation; each row of a generated token is edited by its own distances, so that cached steps
    equal one pass over the text. beta is 0.15 for LLaVA-1.5 and 0.20 for Qwen2-VL (their "1.2" is beta = 0.2: with 1.0
    they report CHAIR 50.2).

    Without renormalisation rows sum to more than 1, and z grows with them. The first generated token has no output
    token before it, and nothing is boosted for it.

    What it does not show: that what was lost was lost from these tokens; any weight that is not on them shrinks, with
    ``renormalise``, by up to 1 / (1 + beta).

    Args:
        beta: what is added to a weight of 1; ``strength`` s makes it s beta.
        window: how many tokens before the row's own, w_s.
        previous: ``"output"``: generated tokens alone, as in the paper; ``"all"``: tokens of the prompt too.
        renormalise: whether rows keep their sums.
    """

    _: KW_ONLY
    beta: float = 0.15
    window: int = 10
    previous: Previous = "output"
    renormalise: bool = False

    source: ClassVar[str] = "arXiv 2601.20279"
    unit: ClassVar[str] = "added factor on weights of recent tokens"
    refused: ClassVar[dict[str, str]] = {
        "cross-attention": "distances mean nothing there",
        "gradients": "without renormalisation: the sums of rows keep none",
    }
    nothing: ClassVar[str] = "no row that was meant comes after an output token (previous='all' boosts the prompt's)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.beta) or self.beta <= -1:
            raise HeadscopeError(f"BoostRecent: beta must be a number above -1, not {self.beta!r}")
        if self.window < 1:
            raise HeadscopeError(f"BoostRecent: window must be at least 1 token, not {self.window!r}")
        if self.previous not in ("output", "all"):
            raise HeadscopeError(f"BoostRecent: previous must be 'output' or 'all', not {self.previous!r}")

    @property
    def neutral(self) -> bool:
        """A beta of 0, too, changes nothing."""
        return super().neutral or self.beta == 0

    @property
    def phased(self) -> bool:
        """Which tokens are output follows from where the prompt ends."""
        return super().phased or self.previous == "output"

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The scores of recent keys raised; without renormalisation each row then scaled to its own normaliser."""
        if call.cross:
            raise HeadscopeError("BoostRecent: queries and keys of cross-attention have no distances; name its tower")
        batch, queries = call.query.shape[0], call.query.shape[2]
        cut = self._first(call).expand(batch)
        at = torch.arange(queries, device=call.query.device) + call.mask.query_offset
        mine = mine & (at > cut[:, None])[:, None]
        self.note(mine)
        if not bool(mine.any()):
            return call
        gamma = 1.0 + self.strength * self.beta
        boosted = call.with_score_edit(self._boost(call, cut, mine, math.log(gamma)))
        if self.renormalise:
            return boosted
        require_no_gradient(call, "BoostRecent without renormalisation")
        near = at[:, None] - torch.arange(1, self.window + 1, device=at.device)
        near = torch.where(near[None] >= cut[:, None, None], near[None], -1)
        mass = boosted.with_(redistribution=None).attend(Request(output=False, targets=near)).target_mass
        assert mass is not None
        grown = 1.0 / (1.0 - (1.0 - 1.0 / gamma) * mass.sum(-1))  # Z' / Z of the boosted normaliser and the model's
        every = torch.ones(call.key.shape[2], dtype=torch.bool, device=at.device)
        return boosted.with_redistribution(Redistribution(every, call.either(mine, grown, 1.0), freed="lost"))

    def _first(self, call: AttentionCall) -> Tensor:
        """The first position that may be boosted, padding counted: (batch or 1,)."""
        if self.previous == "output":
            if call.mask.query_offset == 0 and known_boundary() is None:
                return torch.tensor([call.query.shape[2]], device=call.query.device)  # all of it is the prompt
            return prompt_stop(call, "BoostRecent")
        start = call.mask.start
        return torch.zeros(1, dtype=torch.long, device=call.query.device) if start is None else start

    def _boost(self, call: AttentionCall, cut: Tensor, mine: Tensor, log_gamma: float) -> ScoreEdit:
        at = torch.arange(call.key.shape[2], device=cut.device) + call.mask.key_offset
        later = (at >= cut[:, None])[:, None]
        return ScoreEdit.of(weight(call, mine, rows=log_gamma, keys=later, within=(1, self.window)))
