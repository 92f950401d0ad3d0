"""Raised logits of a span: PAINT, with its selection of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import intervals
from headscope.interventions.attention.score_edit import SpanEdit, number
from headscope.interventions.base import Composed
from headscope.interventions.phases import During


@dataclass(frozen=True, eq=False)
class RaiseSpanLogits(SpanEdit):
    """Raise the scores of a span's keys by a share of their size: Z' = Z + amount |Z|, before softmax.

    The edit of PAI and PAINT (Arif et al. 2025), for whichever span: negative scores shrink towards 0 and positive ones
    grow, so the span's keys always gain (with an amount below 0 they lose).

    Theirs is the last query row of every pass, which is ``during="answer"``: the prompt's last row and those of
    generated tokens. ``paint`` makes their pair of spans, and ``Paint`` chooses it for every prompt.

    It is not invariant to a constant added to a row's scores; in a model with softcap it acts after it. Every head gets
    the same amount, as in the released code; the paper speaks of amounts by head and does not say which.

    Args:
        amount: alpha; 0 changes nothing.
        strength: the factor on ``amount``.
    """

    _: KW_ONLY
    amount: float = 0.7

    source: ClassVar[str] = "Arif et al. 2025, arXiv 2501.12206"
    unit: ClassVar[str] = "share of a score's size"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("RaiseSpanLogits", "amount", self.amount)

    @property
    def neutral(self) -> bool:
        """The amount is 0."""
        return super().neutral or self.amount == 0

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """The amount times their size, added."""
        return self.add(call, mine, "size", rows=self.strength * self.amount, keys=keys[:, None])


def paint(
    top: Sequence[int],
    bottom: Sequence[int],
    *,
    depth: int,
    alpha: float = 0.7,
    beta: float = 0.4,
    during: During = "answer",
) -> Composed:
    """PAINT on one prompt: the image's ``top`` tokens raised by ``alpha``, its ``bottom`` ones by ``beta``.

    The paper's best values; the code's arguments have beta 0.3, its script alpha 0.9 (above which text degenerates). It
    edits layers 2 to 31 of 32, here the same share of ``depth`` layers [OURS]. The guidance by a text-only stream that
    the code also runs (PAI's) is ``Guidance``; with it, the authors' loop leaves the first pass unedited by mistake.

    Args:
        top, bottom: positions in the prompt, e.g. the image's first position added to those of ``paint_tokens``.
        depth: layers of the model.

    Raises:
        HeadscopeError: no token at all, or one in both.
    """
    if set(top) & set(bottom):
        raise HeadscopeError("paint: a token is either of the top or of the bottom")
    layers = tuple(range(depth * 2 // 32, depth))
    parts = [
        RaiseSpanLogits(span=[intervals(sorted(tokens))], amount=amount, layers=layers, during=during)
        for tokens, amount in ((top, alpha), (bottom, beta))
        if len(tokens)
    ]
    if not parts:
        raise HeadscopeError("paint: no token of the image was selected, so there is nothing to raise")
    return Composed(parts)


def paint_tokens(
    first: Any, late: Any, *, local: float = 0.25, class_token: bool = True
) -> tuple[list[int], list[int]]:
    """PAINT's choice among an image's n tokens, by the attention of its vision tower: (top, bottom), patch indices.

    - local: the floor(local n) tokens that the class token of the first layer looks at most, summed over heads;
    - summary: the tokens that the class token of layer -2 looks at most, as many as lie above Q3 + 1.5 IQR;
    - top = local without summary, bottom = summary.

    The sets are those of the authors' code (c5ee7da0d01d) with its default, which has no spatial tokens. That stream is
    left out: it ranks sums of softmax rows, which are all 1, so that its order is rounding. Of equal ones the first.

    Args:
        first: patterns (head, token, token) of the tower's first layer, the class token first.
        late: those of its last layer but one.
        local: share of local tokens.
        class_token: False for towers without one (SigLIP): each token by the attention it receives, mean over queries
            [OURS].

    Raises:
        HeadscopeError: other shapes, or a share of local tokens outside [0, 1].
    """
    patterns = [torch.as_tensor(each, dtype=torch.float64) for each in (first, late)]
    if any(each.dim() != 3 or each.shape[1] != each.shape[2] for each in patterns):
        raise HeadscopeError(f"patterns are (head, token, token), not {[tuple(each.shape) for each in patterns]}")
    if not 0 <= local <= 1:
        raise HeadscopeError(f"paint_tokens: local is a share in [0, 1], not {local}")
    seen, summary = ((each[:, 0, 1:] if class_token else each.mean(1)).sum(0) for each in patterns)
    top, bottom = selected(seen, summary, local)
    return sorted(top), sorted(bottom)


def selected(seen: Tensor, summary: Tensor, local: float) -> tuple[set[int], set[int]]:
    """PAINT's top and bottom tokens, from what each token gets in the first layer and in the last but one: (token,)."""
    low, high = torch.quantile(summary, torch.tensor([0.25, 0.75], dtype=torch.float64, device=summary.device)).tolist()
    bottom = _largest(summary, int((summary > high + 1.5 * (high - low)).sum()))
    return _largest(seen, int(len(seen) * local)) - bottom, bottom


def _largest(values: Tensor, count: int) -> set[int]:
    return set(torch.argsort(values, descending=True, stable=True)[:count].tolist())
