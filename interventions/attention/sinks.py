"""Sink scaling: less of what chosen keys hold, with the rest of the row raised to fill it, or not."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.plan import Plan
from headscope.interventions.attention.finding import FindingEdit
from headscope.kernels.redistribution import Freed, Redistribution


@dataclass(frozen=True, eq=False)
class ScaleSinks(FindingEdit):
    """Multiply the weights of sink keys by ``factor``: 0 removes the sinks.

    Removing attention sinks is the test of what they do in Xiao et al. 2023 (arXiv 2309.17453, the first tokens
    evicted from the cache: with renormalisation) and Gu et al. 2024 (arXiv 2410.10781). Post-softmax, for a row A and
    its sinks C: A'[k] = factor A[k] for k in C. With ``renormalise`` the row is then divided so that it sums to what it
    did; a row that sees sinks alone (the first token's) stays as it is, and the share of a sink logit (gpt-oss) too.
    Without, the row sums to less, and such a row is scaled like any other.

    What it does not show: that a sink "does nothing" where removal costs little without renormalisation, or much with
    it: renormalising also multiplies everything else, by up to 1 / (1 - sink mass), and removing the first token from
    every layer makes the second one the first: in SmolLM2-135M it takes over the sink's mass (0.44) and the loss is
    higher with 0.9 of the first token removed than with all of it (interventions/benchmarks/sink_dose.py).

    Args:
        factor: on the weights; ``strength`` s makes it 1 + s (factor - 1).
        sinks: how many tokens at an example's start, or any keys as a span: positions, or a published name.
        renormalise: whether the row keeps its sum.
        detect: instead of ``sinks``: a head's own, the keys to which the prompt's rows, its last left out, pay more
            than this on average (alpha of Gu et al.; ``CalibrateAttention`` says under which passes). Later ones are
            none. A plain forward that nobody told where its prompt ends (``prompt_boundary``) has its last row counted
            too, so its last logits are not the first ones of ``generate``.
    """

    _: KW_ONLY
    factor: float = 0.0
    sinks: Any = 1
    renormalise: bool = True
    detect: float | None = None

    source: ClassVar[str] = "arXiv 2309.17453, 2410.10781"
    unit: ClassVar[str] = "factor on the weights of sinks"
    refused: ClassVar[dict[str, str]] = {"chunked prefill": "with detect: the sinks are found over all of the prompt"}

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.factor, int | float) and math.isfinite(self.factor)
        if not number or self.factor < 0:
            raise HeadscopeError(f"ScaleSinks: factor must be a number of at least 0, not {self.factor!r}")
        if isinstance(self.sinks, int) and self.sinks < 1:
            raise HeadscopeError(f"ScaleSinks: sinks must be at least 1 token, or a span, not {self.sinks!r}")
        if self.detect is not None and not 0.0 < self.detect < 1.0:
            raise HeadscopeError(f"ScaleSinks: detect must be between 0 and 1, not {self.detect!r}")

    @property
    def neutral(self) -> bool:
        """A factor of 1, too, changes nothing."""
        return super().neutral or self.factor == 1

    @property
    def phased(self) -> bool:
        """Detection has to know where the prompt ends."""
        return super().phased or self.detect is not None

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Find sinks where they are to be found, then scale them."""
        if self.detect is not None and self.concerns(call.module, call.layer):
            self.found.look(call, self.detect, "context", first=True)
        return super().edit(call)

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The weights scaled on the rows that are meant."""
        if self.detect is not None:
            keys = self.found.recall(call)
        else:
            span = (0, self.sinks) if isinstance(self.sinks, int) else self.sinks
            keys = self.keys(call, span, "sinks")[:, None]
        self.note(keys if not self.renormalise else keys & self._others(call, keys))
        factor = 1.0 + self.strength * (self.factor - 1.0)
        keep = call.either(mine, factor, 1.0)
        freed: Freed = "rescaled" if self.renormalise else "lost"
        return call.with_redistribution(Redistribution(keys, keep, freed=freed))

    def _others(self, call: AttentionCall, keys: Tensor) -> Tensor:
        """Whether an example holds a token that is no sink, to take up the mass: bool (batch or 1, head or 1, 1)."""
        return (~keys & (Plan(call).key_positions >= 0)[:, None]).any(-1, keepdim=True)
