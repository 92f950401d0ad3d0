"""Statistics with one value a key: (example, layer, head, key)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import KEY, Kind, Plan, Reader, Statistic, need


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
    kind: ClassVar[Kind] = KEY

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
            plan.key_queries(*self.queries)
        return lambda reduced: {name: need(getattr(reduced, name)) for name in wanted}
