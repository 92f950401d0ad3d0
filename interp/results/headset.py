"""Head sets: ordered heads with weights, the currency between discovery and intervention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True)
class HeadSet:
    """Ordered (layer, head) pairs, 0-based query heads, each with a weight (1.0 unless said otherwise).

    Iterates over the pairs. ``by_layer`` groups them, as an edit needs them.
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
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights) or (1.0,) * len(heads))

    @classmethod
    def of(cls, heads: HeadSet | Iterable[tuple[int, int]], name: str = "heads") -> HeadSet:
        """A head set from pairs, or the same head set."""
        return heads if isinstance(heads, HeadSet) else cls(tuple(heads), name=name)

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
