"""Head sets: ordered heads with weights, the currency between discovery and intervention."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.sealed import sealed, unsealed

FORMAT, KIND = 1, "headscope heads"
SHORT = 80  # characters of a repr
_NAMED = re.compile(r"L?(\d+)(?:H|\.)(\d+)", re.IGNORECASE)

Pair = tuple[int, int]


@dataclass(frozen=True, repr=False)
class HeadSet:
    """Ordered (layer, head) pairs, 0-based query heads, each with a weight (1.0 unless said otherwise).

    Iterates over the pairs; ``heads[0]`` is a pair, ``heads[:5]`` a head set. ``a | b`` is a's heads, then b's others;
    ``a & b`` a's heads that are in b; ``a - b`` a's heads that are not. Each keeps a's order, and a's weight where both
    have one; b may be whatever ``of`` takes. ``by_layer`` groups the pairs, as an edit needs them.
    """

    heads: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    name: str = "heads"

    def __post_init__(self) -> None:
        heads = tuple((int(layer), int(head)) for layer, head in self.heads)
        if len(set(heads)) != len(heads):
            raise HeadscopeError(f"head set {self.name!r} names a head twice; list each (layer, head) once")
        if self.weights and len(self.weights) != len(heads):
            raise HeadscopeError(f"head set {self.name!r} has {len(heads)} heads but {len(self.weights)} weights")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise HeadscopeError(f"head set {self.name!r} has a weight that is no finite number; give one a head")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights) or (1.0,) * len(heads))

    @classmethod
    def of(cls, heads: HeadSet | str | Pair | Iterable[str | Pair], name: str = "heads") -> HeadSet:
        """A head set from ``"L18H6,L17H3"`` (or ``"18.6"``), a pair ``(18, 6)``, several of either, or a head set.

        Raises:
            HeadscopeError: something else, or a head named twice.
        """
        if isinstance(heads, HeadSet):
            return heads
        try:
            if isinstance(heads, bytes | bytearray):
                raise TypeError("bytes are no text")
            held: Any = heads
            held = held.tolist() if hasattr(held, "tolist") else held  # an array or a tensor
            given: list[Any] = held.split(",") if isinstance(held, str) else list(held)
            if len(given) == 2 and all(
                isinstance(number, int | np.integer) and not isinstance(number, bool) for number in given
            ):
                given = [tuple(given)]
            return cls(tuple(_pair(one) for one in given), name=name)
        except (TypeError, ValueError) as error:
            shown = " ".join(repr(heads).split())
            raise HeadscopeError(
                f"{shown:.60} names no heads ({error}); give 'L18H6,L17H3', (18, 6) or a list of either"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """The heads that ``save`` wrote; of a head-score file all heads with a score, highest first, weighted by it.

        Raises:
            HeadscopeError: no such file, or something else.
        """
        try:
            document = unsealed(json.loads(Path(path).read_bytes()))
            if document.get("kind") == KIND and document["format"] == FORMAT:
                return cls(tuple(map(_pair, document["heads"])), tuple(document["weights"]), str(document["name"]))
            scored = [row for row in document["heads"] if row["score"] is not None]
            pairs = tuple((int(row["layer"]), int(row["head"])) for row in scored)
            return cls(pairs, tuple(float(row["score"]) for row in scored), str(document["method"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(
                f"{path} holds no heads ({type(error).__name__}: {error}); give a file of HeadSet.save or `discover`"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the heads, their weights and the name as JSON, atomically.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        document = {"format": FORMAT, "kind": KIND, "name": self.name, "heads": self.heads, "weights": self.weights}
        write_atomically(path, sealed(document))
        return Path(path)

    def __repr__(self) -> str:
        """``HeadSet(L18H6, L17H3, ... 10 heads)``: at most 80 characters."""
        names = [f"L{layer}H{head}" for layer, head in self.heads]
        whole = f"HeadSet({', '.join(names)})"
        if len(whole) <= SHORT:
            return whole
        shown, end = "HeadSet(", f"... {len(self)} heads)"
        for name in names:
            if len(shown) + len(name) + 2 + len(end) > SHORT:
                break
            shown += f"{name}, "
        return shown + end

    @overload
    def __getitem__(self, at: int) -> Pair: ...

    @overload
    def __getitem__(self, at: slice) -> HeadSet: ...

    def __getitem__(self, at: int | slice) -> Pair | HeadSet:
        if isinstance(at, slice):
            return HeadSet(self.heads[at], self.weights[at], self.name)
        return self.heads[at]

    def __or__(self, other: HeadSet | str | Pair | Iterable[str | Pair]) -> HeadSet:
        more = HeadSet.of(other) - self
        return HeadSet(self.heads + more.heads, self.weights + more.weights, self.name)

    def __and__(self, other: HeadSet | str | Pair | Iterable[str | Pair]) -> HeadSet:
        return self._where(HeadSet.of(other), inside=True)

    def __sub__(self, other: HeadSet | str | Pair | Iterable[str | Pair]) -> HeadSet:
        return self._where(HeadSet.of(other), inside=False)

    def _where(self, other: HeadSet, *, inside: bool) -> HeadSet:
        kept = [i for i, head in enumerate(self.heads) if (head in other.heads) == inside]
        return HeadSet(tuple(self.heads[i] for i in kept), tuple(self.weights[i] for i in kept), self.name)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    def by_layer(self) -> dict[int, list[int]]:
        """Head indices of each layer, in this set's order."""
        layers: dict[int, list[int]] = {}
        for layer, head in self.heads:
            layers.setdefault(layer, []).append(head)
        return layers

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError unless every head exists in a model of ``layers`` x ``heads``."""
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise HeadscopeError(
                    f"head L{layer}H{head} does not exist: the model has layers 0-{layers - 1} and heads 0-{heads - 1}"
                )

    def matched_random(self, heads: int, seed: int, *, exclude: Iterable[tuple[int, int]] = ()) -> HeadSet:
        """As many random heads of the same layers, none of this set and none of ``exclude``.

        The control for an ablation: it has the same number of heads in every layer, so depth is not confounded with
        function. ``heads`` is the number of heads a layer.

        Raises:
            HeadscopeError: a layer has too few other heads to draw from.
        """
        rng = np.random.default_rng(seed)
        barred = set(self.heads) | set(exclude)
        chosen: list[tuple[int, int]] = []
        for layer, mine in sorted(self.by_layer().items()):
            free = [head for head in range(heads) if (layer, head) not in barred]
            if len(free) < len(mine):
                raise HeadscopeError(
                    f"layer {layer} has {len(free)} heads left for a control of {len(mine)}; choose fewer heads there"
                )
            chosen += [(layer, int(head)) for head in rng.choice(free, size=len(mine), replace=False)]
        return HeadSet(tuple(chosen), name=f"random (seed {seed})")


def _pair(one: str | Iterable[int]) -> Pair:
    """A head by its name (L18H6, 18.6) or its numbers."""
    if isinstance(one, str):
        found = _NAMED.fullmatch(one.strip())
        if found is None:
            raise ValueError(f"{one.strip()!r} is no head")
        return int(found[1]), int(found[2])
    layer, head = one
    if isinstance(layer, bool) or isinstance(head, bool):
        raise ValueError(f"({layer}, {head}) are no numbers")
    if layer != int(layer) or head != int(head):
        raise ValueError(f"({layer}, {head}) are no whole numbers")
    return int(layer), int(head)
