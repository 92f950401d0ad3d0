"""Parts of a record on disk as one Dataset that reads from them when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from headscope.interp.errors import HeadscopeError

RAGGED = ("query", "key", "query_block", "key_block")  # dimensions whose length depends on the examples


def missing(dtype: np.dtype[Any]) -> float | int:
    """What stands for a missing value of this type."""
    return float("nan") if np.issubdtype(dtype, np.floating) else -1


def damaged(part: Path, error: Exception) -> HeadscopeError:
    """The error of a part that cannot be read."""
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return HeadscopeError(f"{part} is damaged ({cause[:160]}); delete it and trace these examples again")


def join(parts: Sequence[xr.Dataset], paths: Sequence[Path], numbers: NDArray[np.int64] | None) -> xr.Dataset:
    """Examples of all ``parts`` (opened from ``paths``) as one Dataset, padded to the longest example, read when used.

    ``numbers``: the place of each example, through the parts; None leaves them in the parts' order.
    """
    first = parts[0]
    for part, path in zip(parts, paths, strict=True):
        lost = set(first.variables) - set(part.variables)
        if lost:
            raise damaged(path, KeyError(*lost))
    sizes = {dim: max(part.sizes.get(dim, 0) for part in parts) for dim in first.sizes}
    sizes["example"] = sum(part.sizes["example"] for part in parts)
    order = np.arange(sizes["example"]) if numbers is None else np.argsort(numbers, kind="stable")
    owner = np.concatenate([np.stack([np.full(n, i), np.arange(n)], 1) for i, n in enumerate(_counts(parts))])[order]

    def joined(name: str) -> xr.Variable:
        variable = first.variables[name]
        if "example" not in variable.dims:
            return variable if variable.dtype.kind in "biufU" else _text(variable)
        array = _Joined([part.variables[name] for part in parts], paths, owner, sizes)
        return xr.Variable(variable.dims, indexing.LazilyIndexedArray(array), variable.attrs)

    axes = {dim: np.arange(sizes[dim]) for dim in ("example", *RAGGED) if dim in first.coords}
    coords = {str(name): axes.get(str(name), joined(str(name))) for name in first.coords if str(name) not in axes}
    data = {str(name): joined(str(name)) for name in first.data_vars}
    return xr.Dataset(data, {**axes, **coords}, attrs=first.attrs)


def _text(labels: xr.Variable) -> xr.Variable:
    return xr.Variable(labels.dims, np.array([str(label) for label in labels.to_numpy()]), labels.attrs)


def _counts(parts: Sequence[xr.Dataset]) -> list[int]:
    return [part.sizes["example"] for part in parts]


class _Joined(BackendArray):  # type: ignore[misc]  # xarray is untyped here
    """One variable of all parts; an example beyond a part's ragged dimension is missing values."""

    def __init__(
        self, variables: list[xr.Variable], paths: Sequence[Path], owner: NDArray[np.int64], sizes: dict[Any, int]
    ) -> None:
        self.variables, self.paths, self.owner = variables, paths, owner
        self.dims, self.dtype = variables[0].dims, variables[0].dtype
        self.shape = tuple(sizes[dim] for dim in self.dims)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """The values at ``key``: an integer, a slice or an array of integers for every dimension."""
        wanted = [np.atleast_1d(np.arange(size)[at]) for at, size in zip(key, self.shape, strict=True)]
        found = np.full([len(index) for index in wanted], missing(self.dtype), self.dtype)
        owners = self.owner[wanted[self.dims.index("example")]]
        for part in np.unique(owners[:, 0]):
            self._read_part(int(part), owners, wanted, found)
        return found[tuple(0 if np.ndim(at) == 0 and not isinstance(at, slice) else slice(None) for at in key)]

    def _read_part(
        self, part: int, owners: NDArray[np.int64], wanted: list[NDArray[np.int64]], found: NDArray[Any]
    ) -> None:
        variable = self.variables[part]
        there, here = [], []
        for dim, index in zip(self.dims, wanted, strict=True):
            mine = owners[:, 0] == part if dim == "example" else index < variable.sizes[dim]
            there.append(_run((owners[:, 1] if dim == "example" else index)[mine]))
            here.append(np.flatnonzero(mine))
        try:
            found[np.ix_(*here)] = variable[tuple(there)].to_numpy()
        except Exception as error:
            raise damaged(self.paths[part], error) from error


def _run(index: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """Neighbouring positions as a slice, which zarr reads much faster than a list."""
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index
