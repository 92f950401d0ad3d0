"""What every intervention is: a handler with a name, a description and, where it is head-driven, a head set.

``Edit`` is the base of the published ones: a frozen dataclass whose fields say everything, so that describing, copying,
comparing and saving are the same for all. ``Composed`` is several in their order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import make, settings
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interventions import files
from headscope.interventions.chained import Chained
from headscope.interventions.edits import EDITS
from headscope.interventions.phases import PHASES, During, Rows, chosen_rows
from headscope.interventions.words import check_number, described, is_default, listed, short, told


class Intervention(Handler):
    """An edit of attention or of head outputs, in force inside ``with apply(model, intervention)``.

    ``heads`` is the head set that drives it, or None. ``with_heads`` makes the same edit on other heads, which is what
    a matched random control is. ``a + b`` is both, a first.
    """

    name: str = "intervention"
    heads: HeadSet | None = None
    made_for: Mapping[str, Any] | None = None  # of a loaded one: the model it was saved for, checked by ``apply``

    source: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    refused: ClassVar[Mapping[str, str]] = {}  # where it cannot be used, and why

    @classmethod
    def measured(cls, model: ModelLike, given: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """Settings beside ``given`` that are measured on a model, over reference ``texts``, for whoever builds one by
        name (``headscope intervene``)."""
        return {}

    @property
    def phased(self) -> bool:
        """Whether it acts while reading or while writing only."""
        return getattr(self, "during", "always") != "always"

    @property
    def bounded(self) -> bool:
        """Whether it has to know where the prompt ends, for its phase or otherwise."""
        return self.phased

    def with_heads(self, heads: HeadSet) -> Intervention:
        """The same edit driven by other heads."""
        raise HeadscopeError(f"{self.name} is not driven by a head set, so it has no random-head control")

    def with_settings(self, **given: Any) -> Intervention:
        """The same edit with other settings; refused where it has no such setting."""
        raise HeadscopeError(f"{self.name} has no settings to change ({', '.join(given)})")

    def describe(self) -> dict[str, Any]:
        """Everything that decides what it does, JSON-able, for provenance and for resuming."""
        return {"name": self.name, "heads": None if self.heads is None else list(self.heads)}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where it cannot apply to a model of this size."""
        if self.heads is not None:
            self.heads.check(layers, heads)

    def in_force(self, model: ModelLike, tower: str | None) -> Intervention:
        """What one ``apply`` block attaches to ``model``: itself, or a copy with a memory of its own where it remembers
        passes or has to know the model."""
        return self

    def named_layers(self) -> dict[int, str] | None:
        """The layers that it needs to attend, with what an error calls them; None: whichever do."""
        if self.heads is None:
            return None
        layers = self.heads.by_layer().items()
        return {layer: ", ".join(f"L{layer}H{head}" for head in heads) for layer, heads in layers}

    def save(self, path: str | Path, model: ModelLike | None = None) -> Path:
        """Write it as one safetensors file (see ``load_intervention``). With ``model`` the file is for that model:
        its name, revision, shapes and a hash of a few weights are checked where it is loaded and applied.

        Raises:
            HeadscopeError: an edit of no registry, or a setting that a file cannot hold.
        """
        tensors: dict[str, Tensor] = {}
        document = self.document(tensors, "")
        made_for = self.made_for if model is None else files.signature(model)
        return files.write(path, {**document, "model": None if made_for is None else dict(made_for)}, tensors)

    def document(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        """What a file holds of it; its tensors go to ``tensors`` under names that begin with ``prefix``."""
        raise HeadscopeError(
            f"{self.name} cannot be saved: make it a dataclass derived from Edit, with a line in EDITS"
        )

    def __add__(self, other: Intervention) -> Composed:
        return Composed((*parts_of(self), *parts_of(other)))


@dataclass(frozen=True, eq=False)
class Edit(Intervention):
    """Base of the edits that are declarations: frozen dataclasses whose fields are their settings.

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
            bounds = f"between {least:g} and {most:g}" if math.isfinite(most) else "a finite number"
            raise HeadscopeError(f"{kind}: strength must be {bounds}, not {self.strength!r}")
        for one in fields(self):
            if one.type == "float":
                check_number(f"{kind}: {one.name}", getattr(self, one.name))

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
        return make(type(self), type(self).__name__, {**held, **given})

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
        """The query rows of ``call`` that are meant, by phase and positions."""
        return chosen_rows(call, self.during, self.positions)

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


class Composed(Chained, Intervention):
    """Several interventions in a stated order: ``parts[0]`` first, at every place where they act.

    Inside attention all parts change the call one after the other: its scores first, then, where parts move mass after
    softmax, the pattern by each of these in turn. What heads give is then changed by all parts one after the other.
    """

    def __init__(self, parts: Sequence[Intervention]) -> None:
        self.parts: tuple[Intervention, ...] = tuple(part for given in parts for part in parts_of(given))
        if not self.parts:
            raise HeadscopeError("compose at least one intervention, e.g. first + second")
        self.name = " + ".join(part.name for part in self.parts)
        named = dict.fromkeys(head for part in self.parts for head in part.heads or ())
        self.heads = HeadSet(tuple(named)) if named else None

    @property
    def phased(self) -> bool:
        """Whether one of them acts while reading or while writing only."""
        return any(part.phased for part in self.parts)

    def in_force(self, model: ModelLike, tower: str | None) -> Composed:
        """Every part as it is in force."""
        return Composed([part.in_force(model, tower) for part in self.parts])

    def named_layers(self) -> dict[int, str] | None:
        """Those of all parts, unless one takes whichever layers attend."""
        named = [part.named_layers() for part in self.parts]
        found: dict[int, list[str]] = {}
        for one in named:
            for layer, what in (one or {}).items():
                found.setdefault(layer, []).append(what)
        return None if None in named else {layer: ", ".join(dict.fromkeys(words)) for layer, words in found.items()}

    @property
    def bounded(self) -> bool:
        """Whether one of them has to know where the prompt ends."""
        return any(part.bounded for part in self.parts)

    def with_heads(self, heads: HeadSet) -> Composed:
        """Each head of ``self.heads`` becomes the one at its place in ``heads``, in every part that names it.

        Raises:
            HeadscopeError: another number of heads, or no part has any.
        """
        if self.heads is None:
            raise HeadscopeError(f"{self.name} is not driven by a head set, so it has no random-head control")
        if len(heads) != len(self.heads):
            raise HeadscopeError(f"{self.name} names {len(self.heads)} heads; give as many, not {len(heads)}")
        instead = dict(zip(self.heads, heads, strict=True))
        return Composed([moved(part, instead, heads.name) for part in self.parts])

    def with_settings(self, **given: Any) -> Composed:
        """Every part with these settings."""
        return Composed([part.with_settings(**given) for part in self.parts])

    def describe(self) -> dict[str, Any]:
        """Its parts, in their order."""
        return {**super().describe(), "kind": "Composed", "parts": [part.describe() for part in self.parts]}

    def document(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        """The documents of its parts."""
        return {"parts": [part.document(tensors, f"{prefix}{i}.") for i, part in enumerate(self.parts)]}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where one of them cannot apply."""
        for part in self.parts:
            part.check(layers, heads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composed) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def parts_of(intervention: Intervention) -> tuple[Intervention, ...]:
    """The interventions that one is made of, in order."""
    return intervention.parts if isinstance(intervention, Composed) else (intervention,)


def moved(edit: Intervention, instead: Mapping[tuple[int, int], tuple[int, int]], name: str) -> Intervention:
    """``edit`` with each of its heads replaced, the weights kept; one without heads as it is."""
    if edit.heads is None:
        return edit
    return edit.with_heads(HeadSet(tuple(instead[head] for head in edit.heads), edit.heads.weights, name=name))
