"""The questions that the page asks, by name, and their answers: some facts (JSON) and one buffer of numbers.

A question is a path such as ``tile/0/5/3/mass/4/0/1`` (run, layer, head, pool, level, tile row, tile column). The live
widget answers it when it is asked; a saved page holds the answers that it could afford under the same names.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer import views
from headscope.interp.explorer.overview import Column, columns_of, edge, edges
from headscope.interp.explorer.run import Run
from headscope.interp.explorer.tiles import SIDE, Place, Tile, top_level

STRIP = 1024  # values in a piece of an edge
DIFFERENCE = 2  # the "run" that is run 1 less run 0
PICTURE = 640  # pixels to which larger pictures are reduced


class Answer(NamedTuple):
    """Facts and numbers; the facts say how the numbers are to be read."""

    facts: dict[str, Any]
    data: bytes = b""


class Answers:
    """Answers about one run, or two and their difference; ``more`` columns of the overview are of no run."""

    def __init__(self, runs: Sequence[Run], more: Sequence[Column] = (), title: str = "") -> None:
        self.runs, self.title = list(runs), title
        self.own: list[list[Column]] = [columns_of(run.records) for run in runs]
        self.more = list(more)
        self.heads = [(layer, head) for layer, kept in runs[0].layers.items() for head in range(kept.heads)]
        self._kinds: dict[str, Callable[..., Answer]] = {
            "open": self._open, "tile": self._tile, "finer": self._finer, "edge": self._edge, "query": self._query,
            "key": self._key, "answer": self._answer, "picture": self._picture,
        }  # fmt: skip

    @property
    def _tokens(self) -> int:
        return max(len(run.tokens) for run in self.runs)

    @property
    def compared(self) -> bool:
        """Whether there is a difference to show: two runs over texts of one length, with the same heads."""
        if len(self.runs) < 2:
            return False
        a, b = self.runs
        same = {k: kept.heads for k, kept in a.layers.items()} == {k: kept.heads for k, kept in b.layers.items()}
        return same and len(a.tokens) == len(b.tokens)

    def __call__(self, question: str) -> Answer:
        """Answer one question.

        Raises:
            HeadscopeError: it is none, or asks for what the runs do not hold.
        """
        kind, *rest = question.split("/")
        try:
            words = [int(word) if word.lstrip("-").isdigit() else word for word in rest]
            return self._kinds[kind](*words)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise HeadscopeError(f"the explorer cannot answer {question!r:.80} ({error})") from error

    # -- the page as a whole -------------------------------------------------------------------------------------------

    def _open(self) -> Answer:
        first = self.runs[0]
        mask = [kept.call.mask for kept in first.layers.values()]
        facts: dict[str, Any] = {
            "title": self.title,
            "runs": [self._run(run) for run in self.runs],
            "compared": self.compared,
            "heads": self.heads,
            "statistics": self._statistics(),
            "edges": edges(first),
            "side": SIDE,
            "strip": STRIP,
            "top": top_level(self._tokens),
            "causal": all(each.right == 0 for each in mask),
            "windows": {layer: kept.call.mask.left for layer, kept in first.layers.items()},
            "held": sum(run.nbytes for run in self.runs),
        }
        return Answer(facts)

    def _run(self, run: Run) -> dict[str, Any]:
        grids = [
            {"image": grid.image, "box": list(grid.box), "size": list(grid.size), "view": grid.view,
             "positions": grid.positions.tolist()}
            for grid in run.grids
        ]  # fmt: skip
        return {
            "name": run.name,
            "tokens": run.tokens,
            "spans": [{"name": name, "places": span} for name, span in run.spans.items()],
            "answer": run.prompt_length,
            "pictures": [address(one) for one in run.pictures],
            "grids": grids,
        }

    def _statistics(self) -> list[dict[str, Any]]:
        """Each statistic's values in every run, and in the difference of two."""
        found = []
        for column in self.own[0]:
            same = [next((x for x in own if x.name == column.name), None) for own in self.own]
            tables = [x.table(self.heads) for x in same if x is not None]
            if self.compared and len(tables) == 2:
                tables.append({"values": _less(tables[1]["values"], tables[0]["values"])})
            found.append({**_described(column), "tables": tables})
        found += [{**_described(one), "tables": [one.table(self.heads)], "scores": True} for one in self.more]
        return found

    # -- maps ----------------------------------------------------------------------------------------------------------

    def _tile(
        self, run: int, layer: int, head: int, pool: Any, level: int, i: int, j: int, finer: bool = False
    ) -> Answer:
        if min(run, level, i, j) < 0 or level > top_level(self._tokens) or pool not in ("mass", "max"):
            raise ValueError("no such tile")
        place = Place(level, i, j)
        if run == DIFFERENCE and not self.compared:
            raise HeadscopeError("the two runs differ in their tokens or heads, so they have no difference")
        which = self.runs if run == DIFFERENCE else [self.runs[run]]
        tiles = []
        for one in which:
            one.layer(layer, head)
            tiles.append(one.tiles.tile(layer, head, place, pool, finer=finer))
        cells = tiles[1].cells - tiles[0].cells if run == DIFFERENCE else tiles[0].cells
        return _of_tile(cells, tiles)

    def _finer(self, run: int, layer: int, head: int, pool: Any, level: int, i: int, j: int) -> Answer:
        """The same tile, made of more rows."""
        return self._tile(run, layer, head, pool, level, i, j, finer=True)

    def _edge(self, run: int, layer: int, head: int, name: str, level: int, i: int) -> Answer:
        """A piece of the statistic ``name`` along the map, its mean over 2**level tokens a value: float32."""

        if min(run, level, i) < 0 or level > top_level(self._tokens) or i * STRIP << level >= self._tokens:
            raise ValueError("no such piece")

        def piece(one: Run) -> NDArray[np.float32]:
            values = edge(one, name, layer, head)
            part = values[(i * STRIP) << level : ((i + 1) * STRIP) << level]
            filled = np.pad(part, (0, -len(part) % (1 << level)), constant_values=np.nan)
            with np.errstate(invalid="ignore"):
                return np.asarray(np.nanmean(filled.reshape(-1, 1 << level), 1), dtype=np.float32)

        if run == DIFFERENCE:
            values = piece(self.runs[1]) - piece(self.runs[0])
        else:
            values = piece(self.runs[run])
        return Answer({"count": len(values), "type": "f32"}, values.astype("<f4").tobytes())

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _query(self, run: int, position: int) -> Answer:
        return self._looks(views.looks_from, run, position)

    def _key(self, run: int, position: int) -> Answer:
        return self._looks(views.looks_at, run, position)

    def _looks(self, look: Callable[..., views.Looks], run: int, position: int) -> Answer:
        found = [look(one.layers, position) for one in (self.runs if run == DIFFERENCE else [self.runs[run]])]
        cells = found[1].cells - found[0].cells if run == DIFFERENCE else found[0].cells
        facts = {"rows": cells.shape[0], "columns": cells.shape[1], "width": found[-1].width, "type": "f16"}
        facts |= {"top": found[-1].top.tolist(), "mass": np.round(found[-1].mass.astype(float), 4).tolist()}
        return Answer(facts, halves(cells))

    def _answer(self, run: int, layer: int, head: int) -> Answer:
        """The rows that chose the answer's tokens, from the prompt's last token on."""
        one = self.runs[run]
        if one.prompt_length is None:
            raise HeadscopeError(f"{one.name} has no generated answer: record_run(..., generate=20)")
        kept = one.layer(layer, head)
        cells, masses = views.answer(kept, head, one.prompt_length - 1, list(one.spans.values()))
        facts = {"rows": cells.shape[0], "columns": cells.shape[1], "width": views.cell_width(kept.keys)}
        return Answer({**facts, "masses": np.round(masses.astype(float), 4).tolist(), "type": "f16"}, halves(cells))

    def _picture(self, run: int, layer: int, head: int, position: int) -> Answer:
        which = self.runs if run == DIFFERENCE else [self.runs[run]]
        parts = [views.on_picture(one.layer(layer, head), head, position, one.grids) for one in which]
        found = [b - a for a, b in zip(*parts, strict=True)] if run == DIFFERENCE else parts[0]
        shapes = [list(one.shape) for one in found]
        flat = np.concatenate([one.ravel() for one in found]) if found else np.zeros(0, np.float32)
        return Answer({"shapes": shapes, "type": "f32"}, flat.astype("<f4").tobytes())


def halves(values: NDArray[np.float32]) -> bytes:
    """float16, little-endian; rounding is 2**-11 of the value, and 0 below 3e-8."""
    with np.errstate(over="ignore"):
        return values.astype("<f2").tobytes()


def _of_tile(cells: NDArray[np.float32], tiles: Sequence[Tile]) -> Answer:
    rows, of = min(tile.rows for tile in tiles), tiles[0].of
    if np.isnan(cells).all():
        return Answer({"type": "f16", "empty": True, "rows": of, "of": of})
    return Answer({"type": "f16", "rows": rows, "of": of}, halves(cells))


def _described(column: Column) -> dict[str, Any]:
    return {"name": column.name, "label": column.label, "unit": column.unit, "about": column.about}


def _less(a: list[Any], b: list[Any]) -> list[Any]:
    return [None if x is None or y is None else float(f"{x - y:.5g}") for x, y in zip(a, b, strict=True)]


def address(picture: NDArray[np.uint8]) -> str:
    """A picture as a data address."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((PICTURE, PICTURE))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
