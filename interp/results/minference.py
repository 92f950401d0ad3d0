"""Sparse patterns of every head, as MInference publishes them (Jiang et al. 2024, arXiv 2407.02490).

``minference/configs/*.json``: a list with one object a layer, ``{"HEAD": [kind, vertical, slash, score]}``; heads
are query heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet, Pair
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import write_atomically

KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")


@dataclass(frozen=True)
class SparsePattern:
    """What a head keeps: ``kind`` with ``vertical`` columns and ``slash`` diagonals (sinks and recent tokens of
    "stream_llm", blocks of "block_sparse"), and the ``score`` it was chosen by.

    The score is the recall of attention (search_pattern; best is highest) or the number of output entries that differ
    (search_pattern_v2; best is lowest): a file does not say which.
    """

    kind: str
    vertical: int
    slash: int
    score: float


MISSING = SparsePattern("vertical_and_slash", 1000, 6096, 1.0)  # what their runtime takes for a head that is not listed


@dataclass(frozen=True)
class HeadPatterns(Mapping[Pair, SparsePattern]):
    """The pattern of every (layer, head) that a file lists; any other has ``MISSING``."""

    layers: tuple[Mapping[int, SparsePattern], ...]

    @classmethod
    def from_minference(cls, path: str | Path) -> HeadPatterns:
        """Read a file of MInference.

        Raises:
            HeadscopeError: no such file, another form, or a kind that is none of ``KINDS``.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            found = tuple({int(head): _pattern(*row) for head, row in layer.items()} for layer in held)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise HeadscopeError(
                f"{path} is no head configuration of MInference ({type(error).__name__}: {error}); give a list of "
                "layers, each {HEAD: [kind, vertical, slash, score]}"
            ) from error
        return cls(found)

    def to_minference(self, path: str | Path) -> Path:
        """Write what MInference reads."""
        held = [{str(h): [p.kind, p.vertical, p.slash, p.score] for h, p in layer.items()} for layer in self.layers]
        write_atomically(path, json.dumps(held).encode())
        return Path(path)

    def heads(self, kind: str, vertical: int | None = None, slash: int | None = None) -> HeadSet:
        """The heads of a kind, of these sizes where they are given, weighted by their scores, in model order."""
        sizes = (vertical, slash)
        found = {
            pair: one.score
            for pair, one in self.items()
            if one.kind == kind and all(a in (None, b) for a, b in zip(sizes, (one.vertical, one.slash), strict=True))
        }
        return HeadSet(tuple(found), tuple(found.values()), name=f"minference {kind}")

    def scores(self) -> HeadScores:
        """The scores that the patterns were chosen by, as one trial; NaN for heads that are not listed."""
        count = 1 + max((head for layer in self.layers for head in layer), default=-1)
        trial = np.full((1, len(self.layers), count), np.nan)
        for (layer, head), one in self.items():
            trial[0, layer, head] = one.score
        return HeadScores("minference", trial, {"source": "arXiv 2407.02490", "unit": "score of the pattern"})

    def __getitem__(self, pair: Pair) -> SparsePattern:
        layer, head = pair
        if not 0 <= layer < len(self.layers):
            raise KeyError(pair)
        return self.layers[layer][head]

    def __iter__(self) -> Iterator[Pair]:
        return ((i, head) for i, layer in enumerate(self.layers) for head in sorted(layer))

    def __len__(self) -> int:
        return sum(map(len, self.layers))


def _pattern(kind: str, vertical: int, slash: int, score: float) -> SparsePattern:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    if vertical != int(vertical) or slash != int(slash):
        raise ValueError(f"sizes ({vertical}, {slash}) are no whole numbers")
    return SparsePattern(kind, int(vertical), int(slash), float(score))
