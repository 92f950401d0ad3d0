"""AdaptVis as an edit: each prompt's scores of a span are scaled by the factor that the model's confidence chooses."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.before import own_passes
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import takes
from headscope.interventions.attention.scale_span import adaptive_factors
from headscope.interventions.attention.score_edit import SpanEdit, number
from headscope.interventions.phases import Rows, last_row
from headscope.interventions.prompts import Prompts, ReadsPrompts, held_for


@dataclass(frozen=True, eq=False)
class AdaptSpanLogits(ReadsPrompts, SpanEdit):
    """Multiply the scores of a span's keys, in the prompt's last row, by ``unsure`` or ``sure``: AdaptVis.

    Chen et al. 2025, "Why Is Spatial Reasoning Hard for VLMs?" (arXiv 2503.01773). The unedited model reads each prompt
    once; where its confidence in the answer's first token (the largest probability, rounded to two decimals) is below
    ``threshold``, the factor is ``unsure``, which smooths the attention over the image, else ``sure``, which sharpens
    it. With that factor the prompt is read again, as ``ScaleSpanLogits`` does. The defaults are those of the authors'
    run.sh, and ``adaptive_factors`` is the rule. Thresholds are of LLaVA-1.5 on answers of one word and carry over to
    no other model: find yours on examples with known answers.

    What it does not show: that confidence is about the image; the words alone may make a model sure.

    Args:
        threshold: strictly below it the model is unsure.
        unsure: the factor then.
        sure: the factor otherwise.
        confidence: ``"probability"``, or ``"logit"`` as in their code for VSR (see ``adaptive_factors``).
        at: ``"last"``: the prompt's last row alone; ``"all"``: the rows of ``during`` and ``positions``.
        strength: moves the factor from 1 to the one that is chosen.
    """

    _: KW_ONLY
    span: Any = "image"
    threshold: float = 0.4
    unsure: float = 0.5
    sure: float = 1.5
    confidence: Literal["probability", "logit"] = "probability"
    at: Literal["last", "all"] = "last"

    source: ClassVar[str] = "Chen et al. 2025, arXiv 2503.01773"
    unit: ClassVar[str] = "factor on scores"
    refused: ClassVar[dict[str, str]] = {
        "TransformerLens": "the prompt is read before the model reads it, which a bridge does not show",
        "nnsight": "a wrapper would take the unedited pass for its own",
        "chunked prefill": "the confidence is of the prompt's last row",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "unsure", "sure"):
            number("AdaptSpanLogits", name, getattr(self, name))
        adaptive_factors(torch.zeros(2), confidence=self.confidence)
        if self.at not in ("last", "all"):
            raise HeadscopeError(f"AdaptSpanLogits: at must be 'last' or 'all', not {self.at!r}")
        object.__setattr__(self, "_factors", [])

    @property
    def neutral(self) -> bool:
        """Both factors are 1."""
        return super().neutral or self.sure == self.unsure == 1

    @property
    def phased(self) -> bool:
        """The prompt's last row has to be found."""
        return super().phased or self.at == "last"

    @property
    def bounded(self) -> bool:
        """The prompt has to be read whole."""
        return True

    def rows(self, call: AttentionCall) -> Rows:
        """The rows that are meant: of the prompt's last one, where ``at="last"``."""
        rows = super().rows(call)
        return last_row(call, rows) if self.at == "last" else rows

    def read(self, model: ModelLike, prompts: Prompts) -> None:
        """The factors of these prompts."""
        with own_passes(model) as inner:
            last = {"logits_to_keep": 1} if takes(inner, "logits_to_keep") else {}
            logits = inner(**prompts.inputs(), **last, use_cache=False).logits[:, -1]
        vars(self)["_factors"][:] = adaptive_factors(
            logits, threshold=self.threshold, unsure=self.unsure, sure=self.sure, confidence=self.confidence
        )

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """Each example's factor on their scores."""
        held = torch.tensor(vars(self)["_factors"], dtype=torch.float64)
        factors = held_for(held if len(held) else None, len(call.query), self.name)
        moved = self.strength * (factors - 1.0)
        return self.add(call, mine, "score", rows=moved[:, None, None], keys=keys[:, None])
