"""The record: traced statistics as an xarray Dataset, assembled from forward passes, saved to and read from zarr.

Dimensions: example, layer, head, query or key, and what a statistic adds (span, rank, target, position, d_head). Query
and key positions count from each example's first token: left and right padding are gone from a record. Missing values
are NaN (floats) or -1 (positions). On disk a record is a folder of zarr parts and a manifest that is replaced
atomically: a part that is not in the manifest does not exist, so an interrupted append leaves the record as it was.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.files import write_atomically

FORMAT = 1
MANIFEST = "record.json"
RAGGED = ("query", "key")  # dimensions whose length depends on the examples


def concatenate(parts: list[xr.Dataset]) -> xr.Dataset:
    """Records of different examples as one, padded to the longest example.

    Raises:
        HeadscopeError: the records hold different variables, layers or heads.
    """
    if not parts:
        raise HeadscopeError("nothing was recorded: no forward pass ran inside `trace`")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        same_layers = np.array_equal(part["layer"], first["layer"]) and part.sizes["head"] == first.sizes["head"]
        if set(part.data_vars) != set(first.data_vars) or not same_layers:
            raise HeadscopeError("records of different models or statistics cannot be joined; trace them alike")
    sizes = {dim: max(part.sizes.get(dim, 0) for part in parts) for dim in RAGGED}
    padded = [_pad(part, sizes) for part in parts]
    joined = xr.concat(padded, dim="example", data_vars="minimal", coords="minimal", compat="override", join="override")
    joined = joined.assign_coords(example=np.arange(joined.sizes["example"]))
    joined.attrs = dict(first.attrs)
    return joined


def _pad(part: xr.Dataset, sizes: dict[str, int]) -> xr.Dataset:
    short = {
        dim: (0, sizes[dim] - part.sizes[dim]) for dim in RAGGED if dim in part.sizes and part.sizes[dim] < sizes[dim]
    }
    if not short:
        return part
    fills = {name: missing(variable.dtype) for name, variable in part.variables.items()}
    padded = part.pad(short, constant_values=fills)
    for dim in short:
        if dim in part.coords:
            padded = padded.assign_coords({dim: np.arange(sizes[dim])})
    return padded.astype({name: variable.dtype for name, variable in part.data_vars.items()})


def missing(dtype: np.dtype[Any]) -> float | int:
    """What stands for a missing value of this type."""
    return float("nan") if np.issubdtype(dtype, np.floating) else -1


def save_record(record: xr.Dataset, path: str | Path) -> Path:
    """Write a record as a new folder.

    Raises:
        HeadscopeError: something that is not a record is in the way, or a record exists (use ``append_record``).
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HeadscopeError(f"{path} already exists; choose another folder or use append_record")
    return _append(record, path, [])


def append_record(record: xr.Dataset, path: str | Path) -> Path:
    """Add a record's examples to the one at ``path`` (created if absent)."""
    path = Path(path)
    parts = _manifest(path)["parts"] if (path / MANIFEST).exists() else []
    if parts:
        existing = _open(path, parts[0])
        if set(existing.data_vars) != set(record.data_vars) or not np.array_equal(existing["layer"], record["layer"]):
            raise HeadscopeError(f"{path} holds other statistics or layers; save this record to a folder of its own")
    return _append(record, path, parts)


def _append(record: xr.Dataset, path: Path, parts: list[str]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    name = f"part-{len(parts):05d}-{uuid.uuid4().hex[:8]}.zarr"
    try:
        record.to_zarr(path / name, mode="w", consolidated=False)
    except BaseException:
        shutil.rmtree(path / name, ignore_errors=True)
        raise
    manifest = {"format": FORMAT, "kind": "headscope record", "parts": [*parts, name]}
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())
    return path


def load_record(path: str | Path) -> xr.Dataset:
    """Read a record back into memory.

    Raises:
        HeadscopeError: no record there, one of another program or a newer version, or damaged parts.
    """
    path = Path(path)
    return concatenate([_open(path, part) for part in _manifest(path)["parts"]])


def _open(path: Path, part: str) -> xr.Dataset:
    try:
        return xr.open_zarr(path / part, consolidated=False).load()
    except Exception as error:
        raise HeadscopeError(
            f"{path / part} is damaged ({type(error).__name__}); trace these examples again"
        ) from error


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        foreign = manifest["kind"] != "headscope record" or not isinstance(manifest["parts"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadscopeError(f"{path} is not a headscope record; pass the folder that save_record wrote") from error
    if foreign:
        raise HeadscopeError(f"{path} is not a headscope record; pass the folder that save_record wrote")
    if manifest.get("format") != FORMAT:
        raise HeadscopeError(f"{path} has record format {manifest.get('format')}; this version reads {FORMAT}")
    return manifest
