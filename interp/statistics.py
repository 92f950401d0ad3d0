"""Declarations of the statistics a tracer records. A declaration asks for reductions and reads its share of the result.

To add one: a frozen dataclass with ``name``, ``dims`` and ``ask``. ``ask`` receives a ``Plan`` for one attention call,
asks it for reductions and returns a function from the computed ``Attended`` to this statistic's variables. The plan
merges what all declared statistics ask for into one request, so sharing is automatic.

Positions are counted from each example's first real token: padding never shifts a statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.spans import members
from headscope.interp.tracing.plan import Plan as Plan
from headscope.interp.tracing.plan import concatenate
from headscope.kernels.request import Attended

Reader = Callable[[Attended], dict[str, Tensor]]
ROW, KEY, OUTPUT = "row", "key", "output"


@dataclass(frozen=True)
class Statistic:
    """Base of the declarations. ``kind`` says whether values belong to queries, keys, or chosen positions' outputs."""

    name: ClassVar[str] = ""
    kind: ClassVar[Literal["row", "key", "output"]] = "row"

    def ask(self, plan: Plan) -> Reader:
        """Ask ``plan`` for reductions; return how to read them."""
        raise NotImplementedError

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        """Extra trailing dimensions and their labels."""
        return {}

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the record variables this statistic writes."""
        return (self.name,)


@dataclass(frozen=True)
class _Simple(Statistic):
    """A statistic that is one field of ``Attended``."""

    fieldname: ClassVar[str] = ""

    def ask(self, plan: Plan) -> Reader:
        plan.flag(self.fieldname)
        return lambda seen: {self.name: _need(getattr(seen, self.fieldname))}


@dataclass(frozen=True)
class LogSumExp(_Simple):
    """logsumexp of a query's visible scores, in nats, a sink logit included: (example, layer, head, query)."""

    name: ClassVar[str] = "logsumexp"
    fieldname: ClassVar[str] = "lse"


@dataclass(frozen=True)
class Entropy(_Simple):
    """Entropy of a query's pattern over its keys, in nats (0: one key; log n: uniform over n)."""

    name: ClassVar[str] = "entropy"
    fieldname: ClassVar[str] = "entropy"


@dataclass(frozen=True)
class SinkMass(Statistic):
    """Mass on the first ``first`` tokens of the example (4, as StreamingLLM keeps): in [0, 1]."""

    first: int = 4
    name: ClassVar[str] = "sink_mass"

    def ask(self, plan: Plan) -> Reader:
        at = plan.key_positions
        place = plan.linear(((at >= 0) & (at < self.first))[..., None])
        return lambda seen: {self.name: _linear(seen)[..., place].squeeze(-1)}


@dataclass(frozen=True)
class SpanMass(Statistic):
    """Mass on named spans of tokens, dimension ``span``.

    ``spans`` maps a name to ``(first, stop)`` positions, the same for all examples, or to a list with one pair, or one
    list of pairs, an example (in the order the examples are traced within a batch). See ``headscope.interp.spans``.
    """

    spans: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "span_mass"

    def __post_init__(self) -> None:
        if not self.spans:
            raise HeadscopeError("SpanMass needs at least one named span, e.g. SpanMass({'needle': (10, 20)})")

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"span": list(self.spans)}

    def ask(self, plan: Plan) -> Reader:
        at = plan.key_positions
        columns = [members(span, at, plan.call.query.shape[0])[..., None] for span in self.spans.values()]
        place = plan.linear(concatenate(columns))
        return lambda seen: {self.name: _linear(seen)[..., place]}


@dataclass(frozen=True)
class Distance(_Simple):
    """Mean attention distance sum_s A[t,s] (t - s), in tokens (Li et al. 2025, arXiv 2510.13554, head span)."""

    name: ClassVar[str] = "distance"
    fieldname: ClassVar[str] = "distance"


@dataclass(frozen=True)
class WindowedDistance(Statistic):
    """Windowed distance sum_s A[t,s] min(t - s, window), in tokens (WAAD's per-head term, arXiv 2510.13554, W = 10)."""

    window: int = 10
    name: ClassVar[str] = "windowed_distance"

    def ask(self, plan: Plan) -> Reader:
        place = plan.window(self.window)
        return lambda seen: {self.name: _need(seen.window_distance)[..., place]}


@dataclass(frozen=True)
class WindowMass(Statistic):
    """Mass on the last ``window`` tokens, the query's own included: in [0, 1]."""

    window: int = 64
    name: ClassVar[str] = "window_mass"

    def ask(self, plan: Plan) -> Reader:
        place = plan.window(self.window)
        return lambda seen: {self.name: _need(seen.window_mass)[..., place]}


@dataclass(frozen=True)
class TopKeys(Statistic):
    """The ``k`` heaviest keys of each query, heaviest first, dimension ``rank``: ``top_keys`` (positions, -1 for none)
    and ``top_mass``. Keys of equal mass come in any order."""

    k: int = 1
    name: ClassVar[str] = "top_keys"

    @property
    def variables(self) -> tuple[str, ...]:
        return ("top_keys", "top_mass")

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"rank": list(range(self.k))}

    def ask(self, plan: Plan) -> Reader:
        place = plan.top(self.k)
        start = plan.call.mask.start

        def read(seen: Attended) -> dict[str, Tensor]:
            keys, mass = _need(seen.top_keys)[..., place], _need(seen.top_mass)[..., place]
            if start is not None:
                keys = torch.where(keys < 0, -1, keys - start[:, None, None, None])
            return {"top_keys": keys, "top_mass": mass}

        return read


@dataclass(frozen=True, eq=False)
class TargetMass(Statistic):
    """Mass on chosen keys of each query, dimension ``target``: previous token, induction target, needle token ...

    ``targets`` maps a name to a function of query positions (batch or 1, query) returning key positions of that shape
    (negative: none), or to a tensor (batch or 1, length) indexed by query position. Positions count from the example's
    first token.
    """

    targets: Mapping[str, Callable[[Tensor], Tensor] | Tensor] = field(default_factory=dict)
    name: ClassVar[str] = "target_mass"

    def __post_init__(self) -> None:
        if not self.targets:
            raise HeadscopeError("TargetMass needs at least one target, e.g. TargetMass({'previous': lambda q: q - 1})")

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"target": list(self.targets)}

    def ask(self, plan: Plan) -> Reader:
        at = plan.query_positions
        columns = [self._keys(target, at)[..., None] for target in self.targets.values()]
        place = plan.targets(concatenate(columns))
        return lambda seen: {self.name: _need(seen.target_mass)[..., place]}

    def _keys(self, target: Callable[[Tensor], Tensor] | Tensor, at: Tensor) -> Tensor:
        if callable(target):
            return torch.where(at < 0, -1, target(at))
        table = target.to(at.device)
        batch = max(at.shape[0], table.shape[0])
        index = at.clamp(0, table.shape[1] - 1).expand(batch, -1)
        keys = table.expand(batch, -1).gather(1, index)
        return torch.where((at < 0) | (at >= table.shape[1]), -1, keys)


@dataclass(frozen=True)
class KeyMass(Statistic):
    """Attention received by each key: (example, layer, head, key).

    ``reduce``: ``"sum"`` over the queries, ``"mean"`` over the queries that see the key (alpha of Gu et al. 2024,
    arXiv 2410.10781), or ``"max"``. ``queries = (first, stop)`` limits the rows of each forward pass; padded queries
    never count. Over several forward passes (chunks, decoding steps) sums and counts add up.
    """

    reduce: Literal["sum", "mean", "max"] = "sum"
    queries: tuple[int, int] | None = None
    name: ClassVar[str] = "key_mass"
    kind: ClassVar[Literal["row", "key", "output"]] = "key"

    def __post_init__(self) -> None:
        if self.reduce not in ("sum", "mean", "max"):
            raise HeadscopeError(f"KeyMass reduces by 'sum', 'mean' or 'max', not {self.reduce!r}")

    @property
    def variables(self) -> tuple[str, ...]:
        return ("key_mass" if self.reduce == "sum" else f"key_mass_{self.reduce}",)

    def ask(self, plan: Plan) -> Reader:
        wanted = {"sum": ("key_sum",), "mean": ("key_sum", "key_count"), "max": ("key_max",)}[self.reduce]
        for name in wanted:
            plan.flag(name)
        if self.queries is not None:
            plan._fields["key_queries"] = self.queries
        return lambda seen: {name: _need(getattr(seen, name)) for name in wanted}


@dataclass(frozen=True)
class HeadOutput(Statistic):
    """The heads' outputs z at chosen prompt positions: ``z`` (example, layer, head, position, d_head), after any edits.

    ``positions`` count from the example's first token, or from its end where negative (-1: the last prompt token). Read
    from the first forward pass of a prompt.
    """

    positions: tuple[int, ...] = (-1,)
    name: ClassVar[str] = "z"
    kind: ClassVar[Literal["row", "key", "output"]] = "output"

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"position": list(self.positions)}

    def ask(self, plan: Plan) -> Reader:
        call = plan.call
        rows = self.rows(call)

        def read(seen: Attended) -> dict[str, Tensor]:
            z = _need(seen.output)
            index = rows[:, None, :, None].expand(z.shape[0], z.shape[1], -1, z.shape[3])
            return {"z": z.gather(2, index)}

        return read

    def rows(self, call: AttentionCall) -> Tensor:
        """Row index of each position in this call: (batch or 1, position)."""
        mask, queries = call.mask, call.query.shape[2]
        start = torch.zeros(1, dtype=torch.long) if mask.start is None else mask.start.cpu()
        end = torch.full((1,), mask.query_offset + queries) if mask.end is None else mask.end.cpu()
        wanted = torch.tensor(self.positions)
        at = torch.where(wanted < 0, end[:, None] + wanted, start[:, None] + wanted)
        row = at - mask.query_offset
        if bool(((at < start[:, None]) | (at >= end[:, None]) | (row < 0) | (row >= queries)).any()):
            raise HeadscopeError(f"positions {list(self.positions)} do not all exist in a prompt of this length")
        return row.to(call.query.device)


def _need(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _linear(seen: Attended) -> Tensor:
    return _need(seen.linear)
