"""What every intervention is: a handler with a name, a description and, where it is head-driven, a head set.

``Composed`` is several in their order; ``declared.Edit`` is the base of the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interventions import files
from headscope.interventions.chained import Chained

Changed = TypeVar("Changed", bound="Intervention")


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

    @property
    def adds_vectors(self) -> bool:
        """Whether it adds vectors to what heads write, so that random ones in their place are a control."""
        return False

    def with_random_vectors(self, rng: np.random.Generator) -> Intervention:
        """The same edit with a random direction of the same norm in place of every vector that it adds; one that adds
        none as it is."""
        return self

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

    @property
    def chooses(self) -> bool:
        """Whether it chooses heads or tokens for each prompt, so that random ones in their place are a control."""
        return False

    def with_random_choice(self, seed: int) -> Intervention:
        """The same edit with as many random ones in place of what it chooses; one that chooses none as it is."""
        return self

    @contextmanager
    def around(self, model: ModelLike) -> Iterator[None]:
        """What it puts on ``model`` inside a block beside its place among the handlers: nothing, for most."""
        yield

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

    def for_its_model(self, made: Changed) -> Changed:
        """``made``, a changed copy of this edit, for the model that this one was saved for, if it was."""
        if self.made_for is not None:
            object.__setattr__(made, "made_for", self.made_for)
        return made

    def __add__(self, other: Intervention) -> Composed:
        if not isinstance(other, Intervention):
            raise HeadscopeError(f"{self.name} + {other!r:.60}: only interventions are composed")
        return Composed((*parts_of(self), *parts_of(other)))

    def __radd__(self, other: object) -> Intervention:
        if isinstance(other, int) and other == 0:  # where sum() begins
            return self
        raise HeadscopeError(f"{other!r:.60} + {self.name}: only interventions are composed")


class Composed(Chained, Intervention):
    """Several interventions in a stated order: ``parts[0]`` first, at every place where they act.

    Inside attention there are three stages, each in the order of the parts: positions, keys and scores, whose softmax
    is the pattern; mass that is moved between keys of the pattern (``ScaleSinks``, ``CalibrateAttention``,
    ``RedistributeSinks``); what heads give. So an edit of scores acts before one that moves mass also where it is named
    after it (``ForcePattern`` and ``SwapKeys`` are edits of scores, too). An edit that looks for keys (sinks of a head,
    say) looks at the pattern as the parts before it made it, and moves mass of the pattern that all scores made. Among
    edits of scores, a factor on weights added to the scores (``EmphasizeSpan``) comes before any function of them.
    """

    def __init__(self, parts: Sequence[Intervention]) -> None:
        self.parts: tuple[Intervention, ...] = tuple(part for given in parts for part in parts_of(given))
        if not self.parts:
            raise HeadscopeError("compose at least one intervention, e.g. first + second")
        self.name = " + ".join(part.name for part in self.parts)
        named = dict.fromkeys(head for part in self.parts for head in part.heads or ())
        self.heads = HeadSet(tuple(named)) if named else None

    @property
    def made_for(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """The model that the first of its loaded parts was saved for."""
        return next((part.made_for for part in self.parts if part.made_for is not None), None)

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

    @property
    def adds_vectors(self) -> bool:
        """Whether one of them does."""
        return any(part.adds_vectors for part in self.parts)

    def with_random_vectors(self, rng: np.random.Generator) -> Composed:
        """Every part with vectors of its own from ``rng``, in their order."""
        return Composed([part.with_random_vectors(rng) for part in self.parts])

    @property
    def chooses(self) -> bool:
        """Whether one of them does."""
        return any(part.chooses for part in self.parts)

    def with_random_choice(self, seed: int) -> Composed:
        """Every part with random ones."""
        return Composed([part.with_random_choice(seed) for part in self.parts])

    @contextmanager
    def around(self, model: ModelLike) -> Iterator[None]:
        """What every part puts on it, in order."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.around(model))
            yield

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
