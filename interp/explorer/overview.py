"""One number a head and statistic: what the overview shows, with the range or interval that the hover says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer.run import Run
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.scores import HeadScores
from headscope.interp.statistics import SinkMass
from headscope.interp.statistics.declared import unit_of

MOST = 24  # statistics in one overview


LARGEST = "largest over keys"
OF = {"sink_mass": f" on the first {SinkMass().first} tokens"}  # under its plain name it has the default's


@dataclass(frozen=True, eq=False)
class Column:
    """One statistic of every head: by (layer, head) a value, and a range ``low`` to ``high`` that ``about`` describes
    ("" where there is none); ``n`` observations."""

    name: str
    label: str
    unit: str
    about: str
    values: dict[tuple[int, int], tuple[float, float, float, int]]

    def table(self, heads: Sequence[tuple[int, int]]) -> dict[str, list[Any]]:
        """In the order of ``heads``; None where there is no number."""
        rows = [self.values.get(head, (np.nan, np.nan, np.nan, 0)) for head in heads]
        made = [[float(f"{x:.5g}") if np.isfinite(x) else None for x in column] for column in zip(*rows, strict=True)]
        return dict(zip(("values", "low", "high", "n"), made, strict=True))


def columns_of(records: Sequence[xr.Dataset], suffix: str = "") -> list[Column]:
    """Every statistic of a run's records: its mean over queries with the range of the middle 80 % of them, or its
    largest value over keys. Of several examples, the mean over them with a 95 % bootstrap interval. ``suffix`` stands
    behind each name."""
    found: dict[str, Column] = {}
    for record in records:
        for name, variable in _variables(record):
            unit = unit_of(name.split(" ")[0])
            about, values = _reduced(variable)
            own = name + suffix
            said = f"{_said(unit)}{OF.get(name, '')}{', largest over keys' if about == LARGEST else ''}"
            column = found.setdefault(own, Column(own, own.replace("_", " "), said, about, {}))
            column.values.update(values)
    return list(found.values())[:MOST]


def columns_of_scores(scores: Sequence[HeadScores]) -> list[Column]:
    """Results of head methods, with their own bootstrap intervals."""
    found = []
    for one in scores:
        low, high = one.interval
        values = {
            (layer, head): (one.mean[layer, head], low[layer, head], high[layer, head], int(one.n[layer, head]))
            for layer in range(one.layers)
            for head in range(one.heads)
        }
        about = f"{one.level:.0%} bootstrap interval over trials"
        found.append(Column(one.method, one.method.replace("_", " "), "score", about, values))
    return found


def _said(unit: str) -> str:
    return "share of attention" if unit == "mass" else unit


def _variables(record: xr.Dataset) -> Iterator[tuple[str, xr.DataArray]]:
    """Numbers of heads, a further dimension (span, window) taken apart."""
    for name, variable in record.data_vars.items():
        dims = {str(dim) for dim in variable.dims}
        more = dims - {"example", "layer", "head", "query", "key"}
        if not {"layer", "head"} <= dims or variable.dtype.kind != "f" or len(more) > 1 or {"query", "key"} <= dims:
            continue
        if not more:
            yield str(name), variable
            continue
        dim = more.pop()
        if variable.sizes[dim] <= 12:
            for value in variable[dim].to_numpy():
                yield f"{name} {value}", variable.sel({dim: value})


def _reduced(variable: xr.DataArray) -> tuple[str, dict[tuple[int, int], tuple[float, float, float, int]]]:
    along = [dim for dim in ("query", "key") if dim in variable.dims]
    order = [*(["example"] if "example" in variable.dims else []), "layer", "head", *along]
    x = variable.transpose(*order).to_numpy().astype(np.float64)
    x = x if "example" in order else x[None]
    empty = np.full(x.shape[1:3], np.nan)
    low, high, about = empty, empty, ""
    with np.errstate(invalid="ignore"):
        if along == ["key"]:
            each, about = np.nanmax(x, -1), LARGEST
        elif along:
            each = np.nanmean(x, -1)
            if len(x) == 1:
                low, high = np.nanquantile(x[0], (0.1, 0.9), axis=-1)
                about = "mean over queries; range of the middle 80 % of them"
        else:
            each = x
    n = np.isfinite(x[0]).sum(-1) if along and len(x) == 1 else np.full(x.shape[1:3], len(x))
    if len(each) > 1:
        low, high = bootstrap_mean(each, None, level=0.95, resamples=2000)
        about = "95 % bootstrap interval over prompts"
    mean = np.nanmean(each, 0)
    layers, heads = (variable[dim].to_numpy().tolist() for dim in ("layer", "head"))
    values = {
        (int(layer), int(head)): (mean[i, j], low[i, j], high[i, j], int(n[i, j]))
        for i, layer in enumerate(layers)
        for j, head in enumerate(heads)
    }
    return about, values


def edge(run: Run, name: str, layer: int, head: int) -> NDArray[np.float32]:
    """A statistic along the edge of one head's map: a value a query or a key.

    Raises:
        HeadscopeError: no such statistic.
    """
    for record in run.records:
        if name in record.data_vars and layer in record["layer"].to_numpy():
            found = record[name].isel(example=0).sel(layer=layer, head=head).to_numpy()
            return np.asarray(found, dtype=np.float32)
    raise HeadscopeError(f"{run.name} has no statistic {name!r} of layer {layer}")


def edges(run: Run) -> list[dict[str, str]]:
    """The statistics with one value a query or a key."""
    found = {}
    for record in run.records:
        for name, variable in record.data_vars.items():
            axis = next((a for a in ("query", "key") if a in variable.dims), None)
            if axis and set(variable.dims) == {"example", "layer", "head", axis} and variable.dtype.kind == "f":
                words = str(name).replace("_", " ")
                found[str(name)] = {"name": str(name), "label": words, "unit": unit_of(str(name)), "axis": axis}
    return list(found.values())
