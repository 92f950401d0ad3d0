"""Profiles over position: how a head's attention falls off with distance, and what keys receive by where they stand."""

from __future__ import annotations

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.heads.passes import record_of
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.statistics import KeyMass, WindowMass


def distance_profile(
    lm: LanguageModel, texts: Text | None = None, *, length: int = 512, samples: int = 8, batch: int = 4
) -> xr.DataArray:
    """The mass that each head puts on keys by their distance: (example, layer, head, distance), a text an example.

    ``distance`` names the nearest of a bucket: 0, 1, 2, 4, 8, ... up to ``length // 2``, whose bucket holds all keys
    farther away. Rows of the second half of a text count, all of which see every bucket but perhaps the last in full,
    so that a profile is a mean over the same rows throughout; it sums to 1 (less with a sink logit).

    Args:
        lm: load_model's result.
        texts, length, samples, batch: as of ``heads.sinks``: what is read, and how much of it.
    """
    if length < 4:
        raise HeadscopeError(f"length={length}: a profile over distances needs texts of at least 4 tokens")
    half = length // 2
    edges = [0, *(2**i for i in range(half.bit_length()) if 2**i < half), half]
    windows = [*edges[1:], length]
    asked = [WindowMass(window, label=str(window)) for window in windows]
    found = sequences.first_windows(lm, texts, length, samples)
    parts = []
    for first in range(0, len(found), batch):
        record = record_of(lm, found[first : first + batch], asked)
        within = [record[f"{window}.window_mass"].isel(query=slice(half, None)).mean("query") for window in windows]
        inside = xr.concat(within, "distance").transpose("example", "layer", "head", "distance")
        parts.append(inside.copy(data=np.diff(inside.to_numpy(), axis=-1, prepend=0.0)))
    whole = xr.concat(parts, "example").assign_coords(distance=edges, example=np.arange(len(found)))
    return whole.rename("mass").assign_attrs(unit="attention mass")


def received_profile(
    lm: LanguageModel,
    texts: Text | None = None,
    *,
    keys: tuple[int, int] = (4, 192),
    length: int = 256,
    samples: int = 20,
    batch: int = 5,
) -> xr.DataArray:
    """The mean attention that each of the ``keys`` (first, stop) receives from all rows after them: (layer, head, key).

    Every row sees all of the keys (none, under a sliding window), so that a trend over them is the head's and not the
    mask's. The first four tokens, where sinks rest, are left out. ``trend.recency_trend`` takes it.

    Args:
        lm: load_model's result.
        keys: which positions; the rows are those from the stop on.
        texts, length, samples, batch: as of ``heads.sinks``: what is read, and how much of it.
    """
    first, stop = keys
    if not 0 <= first < stop - 1 < length - 1:
        raise HeadscopeError(f"keys={keys}: name at least two positions that come before the last of {length} tokens")
    found = sequences.first_windows(lm, texts, length, samples)
    total: xr.DataArray | None = None
    for start in range(0, len(found), batch):
        record = record_of(lm, found[start : start + batch], [KeyMass(queries=(stop, length))])
        part = record["key_mass"].isel(key=slice(first, stop)).sum("example")
        total = part if total is None else total + part
    assert total is not None
    mean = total / (len(found) * (length - stop))
    return mean.transpose("layer", "head", "key").rename("received").assign_attrs(unit="attention mass")
