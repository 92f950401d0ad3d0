"""The base of published edits: a frozen dataclass whose fields say everything, so that describing, copying, comparing
and saving are the same for all.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import KW_ONLY, Field, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import make, settings
from headscope.interventions import files
from headscope.interventions.base import Intervention
from headscope.interventions.edits import EDITS
from headscope.interventions.phases import PHASES, During, Rows, chosen_rows, is_none
from headscope.interventions.words import check_number, described, is_default, listed, short, told


@dataclass(frozen=True, eq=False)
class Edit(Intervention):
    """Base of the edits that are declarations: frozen dataclasses whose fields are their settings.

    A block in which no row was meant, by phase and positions, ends with a warning.

    Args:
        during: ``"always"``, ``"prefill"`` (the prompt's rows), ``"decode"`` (rows of generated tokens) or ``"answer"``
            (the prompt's last row too, which chooses the first token of the answer; the protocol of Wu et al. 2024).
        strength: from 0 (the unedited model, to the bit) to 1 (the edit).
        positions: only queries at these positions, a span as statistics take it, or the name of a published one.
    """

    _: KW_ONLY
    during: During = "always"
    strength: float = 1.0
    positions: Any = None

    strengths: ClassVar[tuple[float, float]] = (0.0, 1.0)  # which ones mean something
    phases: ClassVar[tuple[str, ...]] = PHASES

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in {"__eq__", "__hash__", "__repr__"} - {*vars(cls)}:  # else dataclass's own, which tensors break
            setattr(cls, name, getattr(Edit, name))

    def __post_init__(self) -> None:
        kind, (least, most) = type(self).__name__, self.strengths
        if self.during not in self.phases:
            raise HeadscopeError(f"{kind}: during must be {listed(self.phases)}, not {self.during!r}")
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if not number or not math.isfinite(self.strength) or not least <= self.strength <= most:
            bounds = f"a Python number between {least:g} and {most:g}" if math.isfinite(most) else "a finite number"
            raise HeadscopeError(f"{kind}: strength must be {bounds}, not {self.strength!r}")
        for one in fields(self):
            if one.type == "float":
                check_number(f"{kind}: {one.name}", getattr(self, one.name))
        object.__setattr__(self, "_met", [])

    @property
    def name(self) -> str:  # type: ignore[override]
        """What results call it: its kind, its heads, and the settings that say more than the defaults."""
        kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(self).__name__).lower()
        if self.heads is not None:
            count = f"{len(self.heads)} heads"
            kind = kind.removesuffix("heads") + count if kind.endswith("heads") else f"{kind} of {count}"
        shown = ", ".join(told(field, getattr(self, field.name)) for field in fields(self) if self._shows(field))
        return f"{kind} ({shown})" if shown else kind

    def _shows(self, field: Field[Any]) -> bool:
        value = getattr(self, field.name)
        return isinstance(value, str | int | float) and (not field.kw_only or value != field.default)

    def with_settings(self, **given: Any) -> Edit:
        """The same edit with other settings, checked like new ones."""
        held = {name: getattr(self, name) for name in settings(type(self))}
        return self.for_its_model(make(type(self), type(self).__name__, {**held, **given}))

    def describe(self) -> dict[str, Any]:
        """Every field, tensors by their hash; weights of heads where they have any."""
        own = {field.name: described(getattr(self, field.name)) for field in fields(self) if field.name != "heads"}
        if self.heads is not None and set(self.heads.weights) - {1.0}:
            own["weights"] = list(self.heads.weights)
        return {**super().describe(), "kind": type(self).__name__, **own}

    def document(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        """Its name in the registry and its settings; refused where it has none, or a file cannot hold a setting."""
        here = f"{type(self).__module__}:{type(self).__qualname__}"
        kind = next((name for name, place in EDITS.places.items() if place == here), None)
        if kind is None:
            raise HeadscopeError(
                f"{type(self).__name__} is in no registry, so a file could not name it: add a line to EDITS, or an "
                "entry point of the group headscope.edits"
            )
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        return {"kind": kind, "settings": {n: files.encode(x, prefix + n, tensors) for n, x in held.items()}}

    def concerns(self, module: str, layer: int) -> bool:
        """Not with strength 0: the layers then run the model's own attention."""
        return self.strength != 0

    def rows(self, call: AttentionCall) -> Rows:
        """The query rows of ``call`` that are meant, by phase and positions; in a block it is kept whether any was."""
        found, held = chosen_rows(call, self.during, self.positions), self._meant
        if held != [True]:
            if isinstance(found, Tensor):  # not looked into now: that would wait for a GPU
                earlier = [x.to(found.device) for x in held if isinstance(x, Tensor)]
                held[:] = [torch.stack([found.any(), *earlier]).any()]
            elif not is_none(found):
                held[:] = [True]
            elif not held:
                held[:] = [False]
        return found

    @property
    def _meant(self) -> list[bool | Tensor]:
        """Whether a row was meant so far; empty where nobody asked yet."""
        held: list[bool | Tensor] = vars(self)["_met"]
        return held

    def finish(self) -> None:
        """Say so where passes came to an end and none of their rows was meant."""
        if self._meant and not bool(self._meant[0]):
            where = "" if self.positions is None else f" at positions {self.positions!r:.60}"
            warnings.warn(
                f"{self.name} changed nothing in this block: no row of its passes was meant (during={self.during!r}"
                f"{where})",
                UserWarning,
                stacklevel=2,
            )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> str:
        return json.dumps(self.describe(), sort_keys=True)

    def __repr__(self) -> str:
        held = [(field, getattr(self, field.name)) for field in fields(self)]
        given = [f"{f.name}={short(x)}" for f, x in held if f.name == "heads" or not is_default(f, x)]
        return f"{type(self).__name__}({', '.join(given)})"
