"""Span emphasis: a span's keys weigh more, or the rest of the prompt less. PASTA is a preset."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interventions.attention.score_edit import SpanEdit, number
from headscope.interventions.phases import prompt_keys


@dataclass(frozen=True, eq=False)
class EmphasizeSpan(SpanEdit):
    """Multiply the weights of a span's keys by ``inside``, those of the prompt's other keys by ``outside``.

    A' = A w / sum A w: weights are multiplied after softmax and the row sums to 1 again, which is ``log w`` added to
    the scores. Generated keys keep weight 1. The span is the union of its pairs: a key in two of them counts once.

    A row that sees none of the prompt's keys but its span's (or, with ``outside`` 1, none of the span's) is as it was.
    More attention to a span does not show that the model uses it.

    Args:
        inside: the factor on the span's keys; above 0.
        outside: the factor on the prompt's other keys; above 0. Other than 1 it has to know where the prompt ends, as
            ``during`` does.
        strength: both factors to this power.
    """

    _: KW_ONLY
    inside: float = 1.0
    outside: float = 1.0

    source: ClassVar[str] = "PASTA: Zhang et al. 2023, arXiv 2311.02262"
    unit: ClassVar[str] = "factor on a key's weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inside", "outside"):
            number("EmphasizeSpan", name, getattr(self, name), above=0)

    @property
    def neutral(self) -> bool:
        """Both factors are 1."""
        return super().neutral or self.inside == self.outside == 1

    @property
    def phased(self) -> bool:
        """Generated keys are told from the prompt's where those outside the span are weighed."""
        return super().phased or self.outside != 1

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """The logarithms of the factors, as a key bias."""
        bias = call.either(keys, self.strength * math.log(self.inside), 0.0)
        if self.outside != 1:
            outside = self.strength * math.log(self.outside)
            bias = bias + call.either(prompt_keys(call, "EmphasizeSpan with outside") & ~keys, outside, 0.0)
        return self.add_to_keys(call, mine, bias)


def pasta(
    span: Any,
    heads: HeadSet | str | None = None,
    *,
    alpha: float = 0.01,
    form: Literal["exclude", "include"] = "exclude",
    layers: tuple[int, ...] | None = None,
) -> EmphasizeSpan:
    """Post-hoc attention steering of a span: PASTA (Zhang et al. 2023, arXiv 2311.02262).

    What differs from the authors' code (QingruZhang/PASTA @ 56a9138d2d07, pastalib/pasta.py): of several sections it
    adds log alpha outside *each*, so that keys inside one of n still lose (n - 1) log alpha, and in "include" it then
    takes log alpha off every key of the prompt, which raises them over generated ones by 1 / alpha. Here several
    sections are one span, their union [OURS]; with one section the weights are the authors'.

    Args:
        span: the emphasised sections: (first, stop) of every example, or one list of sections an example; a bare list
            of pairs is one section an example each.
        heads: the steered heads, different ones in every layer; the paper takes those which, steered alone, solve most
            of a training set. None: every head of ``layers``.
        alpha: the factor on the other keys.
        form: ``"exclude"``: the prompt's keys outside the span are multiplied by alpha, and lose weight against
            generated ones too. ``"include"``: the span's keys are multiplied by alpha, which emphasises them above 1.

    Raises:
        HeadscopeError: another form, or alpha is not above 0.
    """
    if form not in ("exclude", "include"):
        raise HeadscopeError(f"pasta: form must be 'exclude' or 'include', not {form!r}")
    number("pasta", "alpha", alpha, above=0)
    inside, outside = (1.0, alpha) if form == "exclude" else (alpha, 1.0)
    held = None if heads is None else HeadSet.of(heads)
    return EmphasizeSpan(held, span=span, inside=inside, outside=outside, layers=layers)
