"""Head temperature: sharper or flatter attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.score_edit import ScoresEdit, number


@dataclass(frozen=True, eq=False)
class HeadTemperature(ScoresEdit):
    """Divide the scores of heads by a temperature before softmax: A = softmax(Z / T).

    Below 1 attention concentrates on the keys that it already prefers, above 1 it spreads; the order of the keys stays.
    Where scores are q.k alone the queries are divided, which is exact and costs nothing; in layers with softcap, a
    position bias or an earlier edit the finished scores are. A sink logit is no score and keeps its size, so that it
    gains mass as T rises.

    What it does not show: that a head's entropy was what mattered; with T its largest weight changes too.

    Args:
        temperature: above 0, of all heads or one a head, in the order of ``heads``; 1 changes nothing.
        strength: the temperature to this power.
    """

    _: KW_ONLY
    temperature: float | Sequence[float] = 1.0

    source: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531 (temperature of a softmax), on attention scores"
    unit: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        super().__post_init__()
        many = isinstance(self.temperature, Sequence)
        for value in self.temperature if isinstance(self.temperature, Sequence) else (self.temperature,):
            number("HeadTemperature", "temperature", value, above=0)
        if many and (self.heads is None or len(self.heads) != len(self.temperature)):  # type: ignore[arg-type]
            count = "no named" if self.heads is None else len(self.heads)
            raise HeadscopeError(f"HeadTemperature: {self.temperature!r} for {count} heads; give one, or one a head")

    @property
    def neutral(self) -> bool:
        """The temperature is 1."""
        each = self.temperature if isinstance(self.temperature, Sequence) else (self.temperature,)
        return super().neutral or all(value == 1 for value in each)

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The queries divided, or the scores."""
        self.note(mine)
        factor = call.either(mine, self._factors(call)[None, :, None], 1.0)  # (batch or 1, head, query)
        edited = (call.softcap, call.position_bias, call.key_bias, call.score_edit)
        if all(each is None for each in edited):
            return call.with_(query=call.query * factor[..., None].to(call.query.dtype))
        return self.add(call, mine, "score", rows=factor - 1)

    def _factors(self, call: AttentionCall) -> Tensor:
        """1 / T of every head of the layer: (head,), float64 on the CPU."""
        count = call.query.shape[1]
        if not isinstance(self.temperature, Sequence):
            return torch.full((count,), self.temperature**-self.strength, dtype=torch.float64)
        given = zip(self.heads or (), self.temperature, strict=True)
        mine = {head: value for (layer, head), value in given if layer == call.layer}
        return torch.tensor([mine.get(head, 1.0) ** -self.strength for head in range(count)], dtype=torch.float64)
