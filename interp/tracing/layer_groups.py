"""Kinds of layers: those of a tower that attend over the same pieces of the input, and so share examples.

The layers of most towers are all of one kind. In a windowed vision tower (Qwen2.5-VL's) some layers attend within
windows and some over whole images: a window is an example of the one kind and an image is one of the other, so that one
record cannot hold both. Layers with different numbers of heads are kinds as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import concatenate
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import attending
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics.queries import Queries
from headscope.interp.tracing.piece import Piece
from headscope.interp.tracing.session import Session

Done = list[tuple[Session, Piece]]


def by_layer_group(done: Done) -> list[Done]:
    """One pass's pieces, those of layers of one kind together, in order of their first layer."""
    shapes: dict[int, list[tuple[int, ...]]] = {}
    for _, piece in done:
        shapes.setdefault(piece.layer, []).append((piece.where.offset, *piece.where.shape))
    kinds: dict[tuple[tuple[int, ...], ...], Done] = {}
    for session, piece in sorted(done, key=lambda one: one[1].layer):
        kinds.setdefault(tuple(shapes[piece.layer]), []).append((session, piece))
    return list(kinds.values())


def datasets(kinds: list[Done]) -> list[xr.Dataset]:
    """One finished pass of layers of several kinds: a Dataset a kind."""
    made = []
    for done in kinds:
        turns: dict[int, int] = {}
        sessions: list[Session] = []
        for session, piece in done:  # the n-th call of every layer is of the same example
            turn = turns[piece.layer] = turns.get(piece.layer, -1) + 1
            if turn == len(sessions):
                sessions.append(Session(session.statistics, session.module, piece.where.shape[0]))
            sessions[turn].add([piece])
        made.append(concatenate([one for one in (each.dataset() for each in sessions) if one is not None]))
    return made


def join(entries: Sequence[Sequence[xr.Dataset]]) -> list[xr.Dataset]:
    """Records of batches, each a Dataset a kind of layers, as one record a kind."""
    places: dict[int, list[int | None]] = {}
    for number, entry in enumerate(entries):
        for place, dataset in enumerate(entry):
            for layer in dataset["layer"].to_numpy().tolist():
                places.setdefault(layer, [None] * len(entries))[number] = place
    kinds: dict[tuple[int | None, ...], list[int]] = {}
    for layer, found in sorted(places.items()):
        kinds.setdefault(tuple(found), []).append(layer)
    chosen = [
        ([(entry, place) for entry, place in zip(entries, found, strict=True) if place is not None], layers)
        for found, layers in kinds.items()
    ]
    return [concatenate([_only(entry[place], layers) for entry, place in pairs]) for pairs, layers in chosen] or [
        concatenate([])  # raises
    ]


def _only(dataset: xr.Dataset, layers: list[int]) -> xr.Dataset:
    return dataset if dataset["layer"].to_numpy().tolist() == layers else dataset.sel(layer=layers)


def check_no_cache(kinds: list[Done], *, cached: bool) -> None:
    """Refuse layers of several kinds where later passes would have to find their examples again.

    Raises:
        HeadscopeError: the pass continues or fills a cache; the message names the layers.
    """
    if cached or any(session.continues for done in kinds for session, _ in done):
        named = " and ".join(str(sorted({piece.layer for _, piece in done})) for done in kinds)
        raise HeadscopeError(
            f"layers {named} attend over different pieces of the input or with different numbers of heads, which is "
            "not recorded with a cache; choose layers that are alike with layers=..., or pass use_cache=False"
        )


def refuse_several(records: Sequence[xr.Dataset]) -> None:
    """Refuse to choose among kinds of layers.

    Raises:
        HeadscopeError: there are several; the message names them.
    """
    if len(records) > 1:
        kinds = " and ".join(str(record["layer"].to_numpy().tolist()) for record in records)
        first = records[0]["layer"].to_numpy().tolist()
        raise HeadscopeError(
            f"layers {kinds} of {records[0].attrs['module']} attend over different pieces of the input or with "
            "different numbers of heads, so they share no examples: read tracer.records, one a kind, or trace with "
            f"layers={first}"
        )


def refuse_none(model: ModelLike, tower: str | None, queries: Queries | None) -> None:
    """Refuse a record of passes in which nothing was read, although the model attends.

    Raises:
        HeadscopeError: names the towers that attend.
    """
    elsewhere = ", ".join(sorted(attending(bare_model(model))))
    if elsewhere:
        unselected = "" if queries is None else f", where {queries} may have selected no row"
        raise HeadscopeError(
            f"nothing was recorded in {tower or 'the default tower'}{unselected}; name a tower: {elsewhere}"
        )


def numbers_of(layers: Any) -> frozenset[int]:
    """Layer numbers as a set; anything else is refused."""
    given = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers, None]
    if not all(isinstance(layer, int | np.integer) and not isinstance(layer, bool) for layer in given):
        raise HeadscopeError(f"layers={layers!r} names no layers: give their numbers, such as layers=[0, 5]")
    return frozenset(int(layer) for layer in given)
