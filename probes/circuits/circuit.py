"""A circuit as an object: nodes, edges, a file, and how far two of them are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.sealed import sealed, unsealed

FORMAT, KIND = 1, "headscope circuit"


@dataclass(frozen=True)
class Edge:
    """``sender`` moves the answer by ``weight`` through ``receiver`` (``L9H6.q``, or ``logits``): a share of the
    difference between clean and corrupt prompts, as ``path_patching`` gives it."""

    sender: str
    receiver: str
    weight: float


@dataclass(frozen=True, eq=False)
class Circuit:
    """``heads`` of a model of ``size`` (layers, heads a layer), with ``mlps`` (layers) where MLPs are nodes: None where
    they are not, so that all of them belong to it. ``edges`` are those that were measured, no others are denied.

    ``provenance`` says how it was found.
    """

    heads: HeadSet
    size: tuple[int, int]
    mlps: tuple[int, ...] | None = None
    edges: tuple[Edge, ...] = ()
    name: str = "circuit"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers, heads = self.size
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise HeadscopeError(
                    f"circuit {self.name!r}: a model of {layers} x {heads} heads has no L{layer}H{head}"
                )
        if any(not 0 <= layer < layers for layer in self.mlps or ()):
            raise HeadscopeError(f"circuit {self.name!r}: MLPs {self.mlps} are not all of a model of {layers} layers")

    def __repr__(self) -> str:
        mlps = "" if self.mlps is None else f", {len(self.mlps)} MLPs"
        heads = f"{len(self.heads)} of {self.size[0] * self.size[1]} heads"
        return f"Circuit({self.name!r:.40}, {heads}{mlps}, {len(self.edges)} edges)"

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which heads are in it: (layer, head)."""
        held = np.zeros(self.size, dtype=bool)
        for layer, head in self.heads:
            held[layer, head] = True
        return held

    @property
    def mlp_mask(self) -> NDArray[np.bool_]:
        """Which MLPs are: (layer,)."""
        held = np.ones(self.size[0], dtype=bool)
        if self.mlps is not None:
            held[:] = False
            held[list(self.mlps)] = True
        return held

    def with_heads(self, mask: NDArray[np.bool_], mlps: NDArray[np.bool_] | None = None) -> Circuit:
        """The circuit of other nodes, without edges."""
        heads = HeadSet(tuple((int(a), int(b)) for a, b in np.argwhere(mask)))
        held = self.mlps if mlps is None or self.mlps is None else tuple(int(n) for n in np.flatnonzero(mlps))
        return replace(self, heads=heads, mlps=held, edges=())

    def random(self, rng: np.random.Generator) -> Circuit:
        """As many heads in every layer, drawn at random, and as many MLPs."""
        mask = rng.permuted(self.mask, axis=1)
        return self.with_heads(mask, rng.permutation(self.mlp_mask))

    def document(self) -> dict[str, Any]:
        """JSON-able; ``of`` reads it."""
        return {
            "format": FORMAT,
            "kind": KIND,
            "name": self.name,
            "size": list(self.size),
            "heads": [list(pair) for pair in self.heads],
            "weights": list(self.heads.weights),
            "mlps": None if self.mlps is None else list(self.mlps),
            "edges": [asdict(edge) for edge in self.edges],
            "provenance": json.loads(json.dumps(self.provenance, default=str)),
        }

    @classmethod
    def of(cls, held: dict[str, Any]) -> Circuit:
        """The circuit of a ``document``.

        Raises:
            ValueError, KeyError, TypeError: something else.
        """
        if held["kind"] != KIND or held["format"] != FORMAT:
            raise ValueError(f"it holds {held['kind']!r}, format {held['format']}")
        heads = HeadSet(tuple((a, b) for a, b in held["heads"]), tuple(held["weights"]), str(held["name"]))
        mlps = None if held["mlps"] is None else tuple(held["mlps"])
        layers, width = held["size"]
        edges = tuple(Edge(**edge) for edge in held["edges"])
        return cls(heads, (layers, width), mlps, edges, str(held["name"]), dict(held["provenance"]))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON that carries its own checksum, atomically."""
        write_atomically(path, sealed(self.document()))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what ``save`` wrote.

        Raises:
            HeadscopeError: no such file, something else, or a file that was changed.
        """
        try:
            return cls.of(unsealed(json.loads(Path(path).read_bytes())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(
                f"{path} is not a circuit of headscope ({error}); find one with `headscope circuit`"
            ) from error


def compare_circuits(a: Circuit, b: Circuit, *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """How many heads two circuits of one model share, beside what layers alone would give.

    ``shared``, ``of_a`` and ``of_b`` (shares of each circuit), ``jaccard``; under the null, b's heads lie at random
    within their layers (``draws`` permutations): ``expected`` is the mean number shared, ``p`` the share of draws with
    as many or more, the observed one counted, so never 0. What it does not show: that shared heads do the same.

    Raises:
        HeadscopeError: circuits of models of other sizes, or one without heads.
    """
    check_counts(1, draws=draws)
    if a.size != b.size:
        raise HeadscopeError(f"circuits of {a.size} and {b.size} (layers, heads) are of different models")
    if not len(a.heads) or not len(b.heads):
        raise HeadscopeError("a circuit without heads shares none: compare others")
    one, two, rng = a.mask, b.mask, np.random.default_rng(seed)
    shared = int((one & two).sum())
    drawn = np.array([(one & rng.permuted(two, axis=1)).sum() for _ in range(draws)])
    return {
        "shared": float(shared),
        "of_a": shared / one.sum(),
        "of_b": shared / two.sum(),
        "jaccard": shared / (one | two).sum(),
        "expected": float(drawn.mean()),
        "p": float((1 + (drawn >= shared).sum()) / (1 + draws)),
    }


def check_size(circuits: Sequence[Circuit], layers: int, heads: int) -> None:
    """Refuse circuits of another model.

    Raises:
        HeadscopeError: names both sizes.
    """
    for circuit in circuits:
        if circuit.size != (layers, heads):
            raise HeadscopeError(f"{circuit!r} is of {circuit.size} (layers, heads), the model has {(layers, heads)}")
