"""Logit scaling of a span: ScalingVis, and AdaptVis, which chooses the factor by the model's confidence."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.score_edit import SpanEdit, number
from headscope.interventions.phases import Rows, last_row


@dataclass(frozen=True, eq=False)
class ScaleSpanLogits(SpanEdit):
    """Multiply the scores of a span's keys by ``factor`` before softmax, in the prompt's last row.

    Z' = w Z on the image's keys: ScalingVis (Chen et al. 2025), with w of 0.5, 0.8, 1.2, 1.5 or 2.0 in all
    layers and heads. w < 1 smooths the attention over the span, w > 1 sharpens it.

    Scores are signed, so a factor above 1 lowers negative ones further: whether the span gains or loses mass depends on
    the head. (PAINT's ``RaiseSpanLogits`` always raises.) It is not invariant to a constant added to a row's scores,
    and in a model with softcap it acts after it.

    What differs from the authors' code: theirs acts where queries and keys are as many and on the pass's last row, so
    that reading in chunks, right padding, or generating without a cache edits other rows; here it is the row before the
    prompt's end, in every pass. With a caption given theirs scales the caption's rows and one key too many: use
    ``at="all"`` with ``positions``.

    Args:
        factor: w; 1 changes nothing.
        at: ``"last"``: the prompt's last row alone, which chooses the first token of the answer (so it has to know
            where the prompt ends); rows of generated tokens are not edited. ``"all"``: those of ``during`` and
            ``positions``.
        strength: moves the factor from 1 to ``factor``.
    """

    _: KW_ONLY
    factor: float = 1.0
    at: Literal["last", "all"] = "last"

    source: ClassVar[str] = "Chen et al. 2025, arXiv 2503.01773"
    unit: ClassVar[str] = "factor on scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("ScaleSpanLogits", "factor", self.factor)
        if self.at not in ("last", "all"):
            raise HeadscopeError(f"ScaleSpanLogits: at must be 'last' or 'all', not {self.at!r}")

    @property
    def neutral(self) -> bool:
        """The factor is 1."""
        return super().neutral or self.factor == 1

    @property
    def phased(self) -> bool:
        """The prompt's last row has to be found."""
        return super().phased or self.at == "last"

    def rows(self, call: AttentionCall) -> Rows:
        """The rows that are meant: of the prompt's last one, where ``at="last"``."""
        rows = super().rows(call)
        return last_row(call, rows) if self.at == "last" else rows

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """The factor on their scores."""
        return self.add(call, mine, "score", rows=self.strength * (self.factor - 1), keys=keys[:, None])


def adaptive_factors(
    logits: Tensor,
    *,
    threshold: float = 0.4,
    unsure: float = 0.5,
    sure: float = 1.5,
    confidence: Literal["probability", "logit"] = "probability",
) -> list[float]:
    """AdaptVis: the factor of ``ScaleSpanLogits`` for each example, by how sure the unedited model is of its answer.

    Two passes (Chen et al. 2025, arXiv 2503.01773): read the prompt without edit, and generate again with the factor
    that its confidence chooses, ``unsure`` where it is below the threshold and ``sure`` elsewhere. The defaults are
    those of the authors' run.sh; 0.3 is their README's threshold, 1.2 and 2.0 other values of ``sure``. Thresholds are
    of LLaVA-1.5 on answers of one word and carry over to no other model: find yours on examples with known answers.

    Args:
        logits: of the first generated token, (vocabulary,) or (example, vocabulary).
        threshold: strictly below it the model is unsure.
        unsure: the factor then; below 1 it smooths the attention over the image.
        sure: the factor otherwise.
        confidence: ``"probability"``: the largest probability, rounded to two decimals as in the authors' code.
            ``"logit"``: the largest logit, not rounded, which their code for VSR compares under the same name; its
            thresholds are of another scale.

    Raises:
        HeadscopeError: another confidence, or logits of another shape.
    """
    if logits.dim() not in (1, 2):
        raise HeadscopeError(f"logits of the first token are (example, vocabulary), not {tuple(logits.shape)}")
    if confidence not in ("probability", "logit"):
        raise HeadscopeError(f"confidence must be 'probability' or 'logit', not {confidence!r}")
    wide = logits.detach().double().reshape(-1, logits.shape[-1])
    if confidence == "probability":
        sureness = [round(value, 2) for value in wide.softmax(-1).amax(-1).tolist()]
    else:
        sureness = wide.amax(-1).tolist()
    return [unsure if value < threshold else sure for value in sureness]
