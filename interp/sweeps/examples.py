"""Statistics and selections of queries over prompts that run in batches of another order than they were given in.

What a statistic says of each example stands in its ``spans`` and ``targets``, in the order of the prompts; a statistic
of your own that has such values names them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.lazy import missing
from headscope.interp.statistics import OUTPUT, ROW, Divergence, Statistic
from headscope.interp.statistics.queries import Queries
from headscope.interp.statistics.spans import by_example
from headscope.interp.sweeps.batches import rows_alone

Target = Callable[[Tensor], Tensor] | Tensor


def check_statistics(statistics: Sequence[Statistic], lengths: Sequence[int], queries: Queries | None) -> None:
    """Refuse what does not fit prompts of these ``lengths``, before anything runs.

    Raises:
        HeadscopeError: spans or targets for another number of prompts, positions or rows that a prompt does not have.
    """
    short = min(range(len(lengths)), key=lambda i: lengths[i])
    for statistic in statistics:
        if isinstance(statistic, Divergence):
            raise HeadscopeError("Divergence holds one run against another; trace prompt by prompt instead of a sweep")
        rows = {name: len(by_example(span)) for name, span in getattr(statistic, "spans", {}).items()}
        targets = getattr(statistic, "targets", {})
        rows |= {name: target.shape[0] for name, target in targets.items() if not callable(target)}
        for name, count in rows.items():
            if count not in (1, len(lengths)):
                raise HeadscopeError(f"{name!r} is given for {count} prompts, but there are {len(lengths)}")
        if statistic.kind == OUTPUT:
            for position in statistic.coordinates["position"]:
                if not -lengths[short] <= position < lengths[short]:
                    raise HeadscopeError(f"prompt {short} has {lengths[short]} tokens and no position {position}")
    if any(s.kind == ROW for s in statistics) and not len(rows_alone(queries, lengths[short])):
        raise HeadscopeError(f"{queries} keeps no query of prompt {short}, of {lengths[short]} tokens")


def for_examples(statistic: Statistic, examples: Sequence[int]) -> Statistic:
    """A statistic declared for all prompts, as it is for the batch of prompts with the numbers ``examples``."""
    chosen: dict[str, Any] = {}
    if hasattr(statistic, "spans"):
        spans = {name: by_example(span) for name, span in statistic.spans.items()}
        chosen["spans"] = {name: [rows[i % len(rows)] for i in examples] for name, rows in spans.items()}
    if hasattr(statistic, "targets"):
        chosen["targets"] = {name: _target(target, examples) for name, target in statistic.targets.items()}
    return replace(statistic, **chosen) if chosen else statistic


def _target(target: Target, examples: Sequence[int]) -> Target:
    if not callable(target):
        return target[list(examples)] if target.shape[0] > 1 else target

    def alike(at: Tensor) -> Tensor:
        found = target(at[:1])  # prompts are padded on the right, so that rows stand at the same positions in all
        if found.shape[0] != 1:
            raise HeadscopeError(
                "a target function of a sweep takes positions and knows no prompt; give what differs between prompts "
                "as a tensor (prompt, query)"
            )
        return found.expand(at.shape[0], -1)

    return alike


def own_rows(record: xr.Dataset, queries: Queries | None) -> xr.Dataset:
    """``record`` of a padded batch, with just the rows that each prompt keeps when it is traced alone.

    A batch computes the rows that any of its prompts keeps: with ``Last(1)``, another prompt's last row too.

    Raises:
        HeadscopeError: a selection that, in a batch, leaves out rows that it keeps of a prompt alone.
    """
    if queries is None or "query" not in record.dims:
        return record
    lengths, position = record["length"].to_numpy(), record["query_position"].to_numpy()
    own = [rows_alone(queries, int(length)) for length in lengths]
    places = [np.flatnonzero(np.isin(at, rows)) for at, rows in zip(position, own, strict=True)]
    if any(len(place) != len(rows) for place, rows in zip(places, own, strict=True)):
        raise HeadscopeError(f"{queries} keeps other rows in a batch than of a prompt alone; sweep with padding=False")
    index = np.full((len(own), max(len(place) for place in places)), -1)
    for row, place in zip(index, places, strict=True):
        row[: len(place)] = place
    taken = {name: _take(v, index) for name, v in record.variables.items() if {"example", "query"} <= set(v.dims)}
    rest = record.drop_dims("query").drop_vars("query_position", errors="ignore")
    coords = {"query": np.arange(index.shape[1]), "query_position": taken.pop("query_position")}
    return rest.assign(taken).assign_coords(coords)[list(record.data_vars)]


def _take(variable: xr.Variable, index: NDArray[np.int64]) -> xr.Variable:
    """The rows ``index`` (example, row; -1: none) of a variable's query dimension."""
    axis = variable.dims.index("query")
    values = np.moveaxis(variable.to_numpy(), axis, 1)
    found = values[np.arange(len(index))[:, None], index.clip(0)]
    found[index < 0] = missing(found.dtype)
    return xr.Variable(variable.dims, np.moveaxis(found, 1, axis))
