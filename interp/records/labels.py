"""The part of a record that belongs to one label of its statistics."""

from __future__ import annotations

import xarray as xr

from headscope.interp.errors import HeadscopeError


def own(record: xr.Dataset, label: str) -> xr.Dataset:
    """The variables of the statistics with this ``label``, they and their own dimensions under their plain names.

    Raises:
        HeadscopeError: none stands in the record; the message names the labels that do.
    """
    kept = [name for name in record.data_vars if _label(name) == label]
    if not kept:
        labels = sorted({found for found in map(_label, record.data_vars) if found is not None})
        there = f"its labels are {', '.join(labels)}" if labels else "it was traced without labels"
        raise HeadscopeError(f"nothing in this record is labelled {label!r}; {there}")
    chosen = record[kept]
    named = [str(name) for name in dict.fromkeys((*chosen.variables, *chosen.dims)) if _label(name) == label]
    return chosen.rename({name: name.removeprefix(f"{label}.") for name in named})


def _label(name: object) -> str | None:
    before, dot, _ = str(name).partition(".")
    return before if dot else None
