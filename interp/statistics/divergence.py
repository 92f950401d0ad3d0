"""How far a run's patterns lie from those of another run: (example, layer, head, query)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import CallStatistic
from headscope.kernels.divergence import divergence
from headscope.kernels.request import Reduced


class Reference(Protocol):
    """What ``keep_attention`` kept."""

    def like(self, call: AttentionCall) -> AttentionCall:
        """What was kept of the same layer and positions."""


@dataclass(frozen=True, eq=False)
class Divergence(CallStatistic):
    """Per query, of the pattern p of the run that ``keep_attention`` kept and the pattern r of this one, on the same
    number of tokens: what an intervention or another prompt changes about where a head looks.

    ``js_divergence`` (Lin 1991; nats, at most log 2), ``kl_divergence`` KL(p || r) (nats; infinite where an edit took a
    key away that p looks at), ``total_variation`` in [0, 1] and ``cosine_similarity``.
    """

    kept: Reference
    name: ClassVar[str] = "js_divergence"
    unit: ClassVar[str] = "nats"
    units: ClassVar[Mapping[str, str]] = {
        "kl_divergence": "nats",
        "total_variation": "mass",
        "cosine_similarity": "cosine",
    }
    source: ClassVar[str] = "doi 10.1109/18.61115"

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the record variables."""
        return ("js_divergence", "kl_divergence", "total_variation", "cosine_similarity")

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """The distances of a pass's queries from what was kept."""
        before = self.kept.like(call)
        if call.redistribution is not None or before.redistribution is not None:
            raise HeadscopeError(
                f"mass was moved after softmax in layer {call.layer} of {call.module}, whose divergence is not "
                "computed: leave Divergence out, or trace without that edit"
            )
        apart = divergence(before.inputs(), call.inputs())
        return {name: x if rows is None else x[:, :, rows] for name, x in zip(self.variables, apart, strict=True)}
