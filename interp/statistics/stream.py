"""The residual stream at chosen positions of a prompt: (example, layer, position, d_model)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from headscope.interp.attention.stream import PLACES
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import GAPS, OUTPUT, Kind, Plan, Reader, Statistic


@dataclass(frozen=True)
class Resid(Statistic):
    """The residual stream, or what a layer adds to it, after any edits: a variable called as ``place`` (example, layer,
    position, d_model), float32.

    ``place`` is one of ``headscope.interp.attention.stream.PLACES``, which ``StreamCall`` explains. ``positions`` count
    from the example's first real token, or from the prompt's end where negative; they are read in the first forward
    pass of a prompt. Beside statistics of attention a record has the layers that attend, alone all of the tower's.
    """

    place: str = "resid_post"
    positions: tuple[int, ...] = (-1,)
    name: ClassVar[str] = "resid"
    unit: ClassVar[str] = "activation"
    units: ClassVar[Mapping[str, str]] = dict.fromkeys(PLACES, "activation")
    kind: ClassVar[Kind] = OUTPUT
    refused: ClassVar[Mapping[str, str]] = {
        **GAPS,
        "chunked prefill": "the end of the prompt is not known in its first pass",
    }

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise HeadscopeError(f"Resid: no place {self.place!r}; name one of ({', '.join(PLACES)})")

    @property
    def variables(self) -> tuple[str, ...]:
        return (self.place,)

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"position": list(self.positions)}

    def ask(self, plan: Plan) -> Reader:
        """Ask nothing of attention: the tracer reads the stream."""
        return lambda reduced: {}
