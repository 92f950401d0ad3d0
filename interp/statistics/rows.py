"""Statistics with one value a query: (example, layer, head, query)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import GAPS, PACKED, Plan, Reader, Statistic, need
from headscope.interp.statistics.plan import concatenate
from headscope.interp.statistics.spans import members
from headscope.kernels.request import Reduced

_ONE_SEQUENCE = {**GAPS, "cross-attention": "it is a distance between positions of one sequence"}


@dataclass(frozen=True)
class _Simple(Statistic):
    """A statistic that is one field of ``Reduced``."""

    fieldname: ClassVar[str] = ""

    def ask(self, plan: Plan) -> Reader:
        plan.flag(self.fieldname)
        return lambda reduced: {self.name: need(getattr(reduced, self.fieldname))}


@dataclass(frozen=True)
class LogSumExp(_Simple):
    """logsumexp of a query's visible scores, in nats, a sink logit included: (example, layer, head, query)."""

    name: ClassVar[str] = "logsumexp"
    at_any_position: ClassVar[bool] = True
    unit: ClassVar[str] = "nats"
    fieldname: ClassVar[str] = "lse"


@dataclass(frozen=True)
class MaxLogit(_Simple):
    """The largest score of a query's visible keys, after scaling, softcap and bias and before softmax; a sink logit is
    no key: (example, layer, head, query). Where it grows without bound, training diverges (QK-Clip watches it)."""

    name: ClassVar[str] = "max_logit"
    at_any_position: ClassVar[bool] = True
    unit: ClassVar[str] = "nats"
    source: ClassVar[str] = "arXiv 2507.20534"
    fieldname: ClassVar[str] = "max"


@dataclass(frozen=True)
class Entropy(_Simple):
    """Entropy of a query's pattern over its keys, in nats (0: one key; log n: uniform over n)."""

    name: ClassVar[str] = "entropy"
    at_any_position: ClassVar[bool] = True
    unit: ClassVar[str] = "nats"
    source: ClassVar[str] = "arXiv 1906.04341"
    fieldname: ClassVar[str] = "entropy"


@dataclass(frozen=True)
class SinkMass(Statistic):
    """Mass on the first ``first`` tokens of the example (4, as StreamingLLM keeps): in [0, 1]."""

    first: int = 4
    name: ClassVar[str] = "sink_mass"
    at_any_position: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ("first",)
    unit: ClassVar[str] = "mass"
    source: ClassVar[str] = "arXiv 2309.17453"
    refused: ClassVar[Mapping[str, str]] = {**GAPS, **PACKED}

    def ask(self, plan: Plan) -> Reader:
        at = plan.key_positions
        place = plan.linear(((at >= 0) & (at < self.first))[..., None])
        return lambda reduced: {self.name: need(reduced.linear)[..., place].squeeze(-1)}


@dataclass(frozen=True)
class SpanMass(Statistic):
    """Mass on named spans of tokens, dimension ``span``.

    ``spans`` maps a name to ``(first, stop)`` positions, the same for all examples, or to a list with one pair, or one
    list of pairs, an example (in the order the examples are traced within a batch).
    """

    spans: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "span_mass"
    at_any_position: ClassVar[bool] = True
    unit: ClassVar[str] = "mass"
    held: ClassVar[tuple[str, ...]] = ("spans",)

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"span": list(self.spans)}

    def ask(self, plan: Plan) -> Reader:
        at = plan.key_positions
        columns = [members(span, at, plan.call.query.shape[0])[..., None] for span in self.spans.values()]
        place = plan.linear(concatenate(columns))
        return lambda reduced: {self.name: need(reduced.linear)[..., place]}


@dataclass(frozen=True)
class Distance(_Simple):
    """Mean attention distance sum_s A[t,s] (t - s), in tokens (Li et al. 2025, arXiv 2510.13554, head span)."""

    name: ClassVar[str] = "distance"
    unit: ClassVar[str] = "tokens"
    source: ClassVar[str] = "arXiv 2510.13554"
    refused: ClassVar[Mapping[str, str]] = _ONE_SEQUENCE
    fieldname: ClassVar[str] = "distance"


@dataclass(frozen=True)
class WindowedDistance(Statistic):
    """Windowed distance sum_s A[t,s] min(t - s, window), in tokens (WAAD's per-head term, arXiv 2510.13554, W = 10)."""

    window: int = 10
    name: ClassVar[str] = "windowed_distance"
    counts: ClassVar[tuple[str, ...]] = ("window",)
    unit: ClassVar[str] = "tokens"
    source: ClassVar[str] = "arXiv 2510.13554"
    refused: ClassVar[Mapping[str, str]] = _ONE_SEQUENCE

    def ask(self, plan: Plan) -> Reader:
        place = plan.window(self.window)
        return lambda reduced: {self.name: need(reduced.window_distance)[..., place]}


@dataclass(frozen=True)
class WindowMass(Statistic):
    """Mass on the last ``window`` tokens, the query's own included: in [0, 1]."""

    window: int = 64
    name: ClassVar[str] = "window_mass"
    counts: ClassVar[tuple[str, ...]] = ("window",)
    unit: ClassVar[str] = "mass"
    refused: ClassVar[Mapping[str, str]] = _ONE_SEQUENCE

    def ask(self, plan: Plan) -> Reader:
        place = plan.window(self.window)
        return lambda reduced: {self.name: need(reduced.window_mass)[..., place]}


@dataclass(frozen=True)
class TopKeys(Statistic):
    """The ``k`` heaviest keys of each query, heaviest first, dimension ``rank``: ``top_keys`` (positions, -1 for none)
    and ``top_mass``. Keys of equal mass come in any order."""

    k: int = 1
    name: ClassVar[str] = "top_keys"
    at_any_position: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = ("k",)
    unit: ClassVar[str] = "token position"
    units: ClassVar[Mapping[str, str]] = {"top_mass": "mass"}

    @property
    def variables(self) -> tuple[str, ...]:
        return ("top_keys", "top_mass")

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"rank": list(range(self.k))}

    def ask(self, plan: Plan) -> Reader:
        place = plan.top(self.k)
        start = plan.call.mask.start

        def read(reduced: Reduced) -> dict[str, Tensor]:
            keys, mass = need(reduced.top_keys)[..., place], need(reduced.top_mass)[..., place]
            if start is not None:
                keys = torch.where(keys < 0, -1, keys - start[:, None, None, None])
            return {"top_keys": keys, "top_mass": mass}

        return read


@dataclass(frozen=True, eq=False)
class TargetMass(Statistic):
    """Mass on chosen keys of each query, dimension ``target``: previous token, induction target, needle token ...

    ``targets`` maps a name to a function of query positions (batch or 1, query) returning key positions of that shape
    (negative: none), or to a tensor (batch or 1, length) indexed by query position. Positions count from the example's
    first token; a key that the query does not see has no mass.
    """

    targets: Mapping[str, Callable[[Tensor], Tensor] | Tensor] = field(default_factory=dict)
    name: ClassVar[str] = "target_mass"
    unit: ClassVar[str] = "mass"
    refused: ClassVar[Mapping[str, str]] = {**GAPS, **PACKED}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.targets, Mapping) or not self.targets:
            raise HeadscopeError("TargetMass needs at least one target, e.g. TargetMass({'previous': lambda q: q - 1})")
        for name, target in self.targets.items():
            whole = isinstance(target, Tensor) and target.dim() == 2 and not target.is_floating_point()
            if not callable(target) and not whole:
                raise HeadscopeError(
                    f"target {name!r} is neither a function of query positions nor a tensor (batch or 1, length) of "
                    "key positions, which are whole numbers"
                )

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"target": list(self.targets)}

    def ask(self, plan: Plan) -> Reader:
        at = plan.query_positions
        columns = [self._keys(target, at)[..., None] for target in self.targets.values()]
        place = plan.targets(concatenate(columns))
        return lambda reduced: {self.name: need(reduced.target_mass)[..., place]}

    def _keys(self, target: Callable[[Tensor], Tensor] | Tensor, at: Tensor) -> Tensor:
        if callable(target):
            return torch.where(at < 0, -1, target(at))
        table = target.to(at.device)
        batch = max(at.shape[0], table.shape[0])
        index = at.clamp(0, table.shape[1] - 1).expand(batch, -1)
        keys = table.expand(batch, -1).gather(1, index)
        return torch.where((at < 0) | (at >= table.shape[1]), -1, keys)
