"""Statistics with one value a key: (example, layer, head, key)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import KeyStatistic, Plan, Reader, need
from headscope.kernels.request import Reduced


@dataclass(frozen=True)
class KeyMass(KeyStatistic):
    """Attention received by each key: (example, layer, head, key).

    ``reduce``: ``"sum"`` over the queries, ``"mean"`` over the queries that see the key (alpha of Gu et al. 2024,
    arXiv 2410.10781), or ``"max"``. ``queries = (first, stop)`` limits the rows of each forward pass, a list of such
    pairs those of each example; padded queries never count. Over several forward passes (chunks, decoding steps) sums
    and counts add up. Two ranges in one trace need a ``label``, or another ``reduce``.
    """

    reduce: Literal["sum", "mean", "max"] = "sum"
    queries: tuple[int, int] | Sequence[tuple[int, int]] | None = None
    name: ClassVar[str] = "key_mass"
    unit: ClassVar[str] = "mass, summed over queries"
    units: ClassVar[Mapping[str, str]] = {"key_mass_mean": "mass", "key_mass_max": "mass"}
    source: ClassVar[str] = "arXiv 2410.10781"
    refused_with: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "queries": {
            "padding": "query rows would count the padding",
            "cache": "query rows count from each pass",
            "chunked prefill": "query rows count from each pass",
        }
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("sum", "mean", "max"):
            raise HeadscopeError(f"KeyMass reduces by 'sum', 'mean' or 'max', not {self.reduce!r}")
        if not all(pair is None or (len(pair) == 2 and 0 <= pair[0] < pair[1]) for pair in self._ranges()):
            raise HeadscopeError(
                "KeyMass takes queries=(first, stop), rows from 0 on, or one such pair an example, not "
                f"{self.queries!r}"
            )

    def _ranges(self) -> list[tuple[int, int] | None]:
        """The rows of every example; one that stands for all."""
        given: Any = self.queries
        if given is None or not len(given) or not hasattr(given[0], "__len__"):
            return [given]
        return list(given)

    @property
    def variables(self) -> tuple[str, ...]:
        return ("key_mass" if self.reduce == "sum" else f"key_mass_{self.reduce}",)

    def ask(self, plan: Plan) -> Reader:
        wanted = {"sum": ("sum",), "mean": ("sum", "count"), "max": ("max",)}[self.reduce]
        ranges, batch = self._ranges(), plan.call.query.shape[0]
        if len(ranges) not in (1, batch):
            raise HeadscopeError(f"queries are given for {len(ranges)} examples, but the batch has {batch}")
        rows = plan.call.query.shape[2]
        beyond = [pair for pair in ranges if pair is not None and pair[0] >= rows]
        if beyond and self.reduce == "mean":
            raise HeadscopeError(f"KeyMass('mean', queries={beyond[0]}): the pass has query rows 0 to {rows - 1} only")
        places = [plan.columns(**dict.fromkeys(wanted, True), queries=pair) for pair in ranges]

        def read(reduced: Reduced) -> dict[str, Tensor]:
            each = {part: [need(getattr(reduced.columns[place], part)) for place in places] for part in wanted}
            return {part: xs[0] if len(xs) == 1 else _own(xs) for part, xs in each.items()}

        return read

    def merge(self, part: str, held: Tensor, value: Tensor) -> Tensor:
        """Sums and counts add up; the largest stays."""
        return torch.maximum(held, value) if part == "max" else held + value

    def finish(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The one variable; 0 for a key that no query sees."""
        if self.reduce == "mean":
            return {"key_mass_mean": parts["sum"] / parts["count"].clamp(min=1)}
        return {self.variables[0]: parts[self.reduce]}


def _own(found: Sequence[Tensor]) -> Tensor:
    """Each example's row of what was found for it; a count that does not depend on the example has one for all."""
    return torch.cat([x[min(b, len(x) - 1)][None] for b, x in enumerate(found)])
