"""Image sinks removed: text no longer looks at the image tokens that are sinks, or looks less."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.found import as_keys
from headscope.interventions.attention.stream_sinks import StreamSinks
from headscope.kernels.redistribution import Freed, Redistribution


@dataclass(frozen=True, eq=False)
class ScaleImageSinks(StreamSinks):
    """Multiply the weights of a span's sink tokens by ``factor`` in the rows after the span: 0 removes them.

    The test of what visual sinks do in Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large
    Multimodal Models" (arXiv 2503.03321): attention from the text to them is cut, and the paper finds next to no drop,
    where as many random image tokens cost much. Post-softmax, A'[k] = factor A[k] for sinks k of the layer that the
    span holds; with ``renormalise`` (their knockout, before softmax) the row is then divided so that it sums to what it
    did. Sinks that stand in the text are left alone. Which tokens are sinks: see ``RedistributeSinks``, and
    ``found_in`` for a model for which nobody published dimensions.

    ``tokens="random"`` is the control: as many of the span's other tokens, drawn anew for every layer, at the same
    places in prompts with as many tokens in the span.

    Tokens that are mostly padding, the other kind of sink that the literature removes, are known beforehand: hide
    those that ``padded_patches`` names with ``KnockOut``, or take mass from them with ``ScaleSinks``.

    What it does not show: that sinks hold nothing: image tokens still read each other through them, and what a sink
    gathered may have moved on in the layers before.

    Args:
        factor: on the weights; ``strength`` s makes it 1 + s (factor - 1).
        renormalise: whether rows keep their sums.
        tokens: "sinks", or "random" ones.
        seed: of random tokens.
    """

    _: KW_ONLY
    factor: float = 0.0
    renormalise: bool = True
    tokens: Literal["sinks", "random"] = "sinks"
    seed: int = 0

    source: ClassVar[str] = "arXiv 2503.03321"
    unit: ClassVar[str] = "factor on the weights of sinks"

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.factor < 0:
            raise HeadscopeError(f"ScaleImageSinks: factor must be at least 0, not {self.factor!r}")
        if self.tokens not in ("sinks", "random"):
            raise HeadscopeError(f"ScaleImageSinks: tokens is 'sinks' or 'random', not {self.tokens!r}")

    @property
    def neutral(self) -> bool:
        """A factor of 1, too, changes nothing."""
        return super().neutral or self.factor == 1

    @property
    def chooses(self) -> bool:
        """Which tokens, for each prompt."""
        return self.tokens != "random"

    def with_random_choice(self, seed: int) -> ScaleImageSinks:
        """As many of the span's other tokens."""
        return self.for_its_model(replace(self, tokens="random", seed=seed))

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The weights scaled in the rows behind the span."""
        sinks, span, mine, of_prompt = self.behind(call, mine)
        keys = sinks & span
        if self.tokens == "random":
            keys = as_keys(self._others(self.spanned(call).expand_as(of_prompt), of_prompt, call.layer), call)
        self.note(mine & keys.any(-1)[:, None, None])
        keep = call.either(mine, 1.0 + self.strength * (self.factor - 1.0), 1.0)
        freed: Freed = "rescaled" if self.renormalise else "lost"
        return call.with_redistribution(Redistribution(keys[:, None], keep, freed=freed))

    def _others(self, span: Tensor, sinks: Tensor, layer: int) -> Tensor:
        """As many of a span's tokens as it has ``sinks``, which are none: bool (batch, position)."""
        found = torch.zeros_like(span)
        for b in range(len(span)):
            tokens = span[b].nonzero()[:, 0]
            free = ~sinks[b, tokens]
            order = torch.from_numpy(np.random.default_rng([self.seed, layer, len(tokens)]).permutation(len(tokens)))
            order = order.to(free.device)
            found[b, tokens[order[free[order]][: int((~free).sum())]]] = True
        return found
