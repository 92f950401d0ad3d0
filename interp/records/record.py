"""The record: traced statistics as an xarray Dataset, assembled from forward passes, saved to and read from zarr.

Dimensions: example, layer, head, query or key (or blocks of them), and what a statistic adds (span, rank, target,
position, d_head). Query and key positions count from each example's first token: left and right padding are gone from a
record. Missing values are NaN (floats) or -1 (positions). On disk a record is a folder of zarr parts and a manifest
that is replaced atomically: a part that is not in the manifest does not exist, so an interrupted append leaves the
record as it was. ``load_record`` reads a whole record, ``open_record`` reads values when they are used.

Every part has a list of its files (``checksums/``). Opening a record compares names, sizes and metadata with it,
``load_record`` and ``each_part`` every byte; a chunk that is read later carries a checksum of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from zarr.codecs import ZstdCodec

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.checksums import check_part, write_checksums
from headscope.interp.records.lazy import damaged, is_ragged, join, missing
from headscope.interp.records.store import local
from headscope.interp.runs.files import write_atomically, writing
from headscope.interp.runs.sealed import sealed, unsealed

FORMAT = 2
PART = re.compile(r"part-[0-9a-f-]+\.zarr")  # no name leads out of the record's folder
MANIFEST = "record.json"
SWEEP = "sweep.json"  # settings of the sweep that writes a record


def concatenate(parts: list[xr.Dataset]) -> xr.Dataset:
    """Records of different examples as one, padded to the longest example.

    Raises:
        HeadscopeError: the records hold different statistics, layers, heads, spans, positions or blocks.
    """
    if not parts:
        raise HeadscopeError("nothing was recorded: no forward pass ran inside `trace`")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        what = _difference(first, part)
        if what:
            raise HeadscopeError(f"records that differ in their {what} cannot be joined; trace them alike")
    ragged = {str(dim) for part in parts for dim in part.sizes if is_ragged(dim)}
    sizes = {dim: max(part.sizes.get(dim, 0) for part in parts) for dim in ragged}
    padded = [_pad(part, sizes) for part in parts]
    joined = xr.concat(padded, dim="example", data_vars="minimal", coords="minimal", compat="override", join="override")
    joined = joined.assign_coords(example=np.arange(joined.sizes["example"]))
    joined.attrs = dict(first.attrs)
    return joined


def _difference(one: xr.Dataset, other: xr.Dataset) -> str:
    """In what two records differ that one record has once: variables, labels, what values must be read with; or ''."""
    if set(one.data_vars) != set(other.data_vars):
        return "statistics"
    for dim in sorted(str(dim) for dim in one.dims if dim != "example" and not is_ragged(dim)):
        labels = [x[dim].to_numpy().tolist() if dim in x.coords else x.sizes.get(dim) for x in (one, other)]
        if labels[0] != labels[1]:
            return f"{dim} ({labels[0]} and {labels[1]})"
    for name, variable in one.data_vars.items():
        if variable.attrs != other[name].attrs:
            return f"{name} ({variable.attrs} and {other[name].attrs})"
    return ""


def _pad(part: xr.Dataset, sizes: dict[str, int]) -> xr.Dataset:
    short = {dim: (0, size - part.sizes[dim]) for dim, size in sizes.items() if part.sizes.get(dim, size) < size}
    if not short:
        return part
    coords = [name for name in part.coords if name not in part.dims]
    flat = part.reset_coords(coords)  # pad fills coordinates with NaN, whatever it is told
    fills = {name: missing(variable.dtype) for name, variable in flat.variables.items()}
    padded = flat.pad(short, constant_values=fills)
    padded = padded.assign_coords({dim: np.arange(sizes[dim]) for dim in short if dim in part.coords})
    return padded.astype({name: variable.dtype for name, variable in flat.data_vars.items()}).set_coords(coords)


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
    """Add a record's examples to the one at ``path`` (created if absent).

    Raises:
        HeadscopeError: the record there holds other statistics or layers, or is a sweep's, which has its own examples.
    """
    path = Path(path)
    manifest = _manifest(path) if (path / MANIFEST).exists() else {"parts": []}
    if manifest.get("numbered"):
        raise HeadscopeError(f"{path} was written by a sweep over its own prompts; save this record elsewhere")
    parts = manifest["parts"]
    if parts:
        what = _difference(_open(path, parts[0]), record)
        if what:
            raise HeadscopeError(f"the record at {path} differs in its {what}; save this one to a folder of its own")
    return _append(record, path, parts)


def _append(record: xr.Dataset, path: Path, parts: list[str]) -> Path:
    name = f"part-{len(parts):05d}-{uuid.uuid4().hex[:8]}.zarr"
    write_part(record, path, name)
    write_manifest(path, [*parts, name])
    return path


def write_part(record: xr.Dataset, path: Path, name: str) -> None:
    """Write a record's examples as the part ``name`` of the folder ``path``: whole and on disk, or not at all.

    Raises:
        HeadscopeError: the disk is full, or the folder cannot be written.
    """
    unfinished = path / f".{name}.{uuid.uuid4().hex[:8]}"
    labels = {key: label.astype(object) for key, label in record.coords.items() if label.dtype.kind == "U"}
    record = record.assign_coords(labels)  # zarr has a specification of text of any length, not of numpy's
    packed = {str(key): {"compressors": (ZstdCodec(level=0, checksum=True),)} for key in record.variables}
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            record.to_zarr(unfinished, mode="w", consolidated=False, encoding=packed)
            for file in (file for file in unfinished.rglob("*") if file.is_file()):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            write_checksums(path, name, unfinished, [str(key) for key in (*record.data_vars, *record.coords)])
            os.replace(unfinished, path / name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_manifest(path: Path, parts: Sequence[str], *, numbered: bool = False, **attrs: str) -> None:
    """Make ``parts`` the record at ``path``. ``numbered``: their ``example`` coordinates say which example comes where;
    otherwise examples come in the parts' order. ``attrs`` replace the parts' attributes."""
    manifest = {"format": FORMAT, "kind": "headscope record", "parts": list(parts)}
    if numbered:
        manifest |= {"numbered": True, "attrs": attrs}
    write_atomically(path / MANIFEST, sealed(manifest))


def load_record(path: str | Path) -> xr.Dataset:
    """Read a record back into memory, from a folder or a URL that fsspec opens (of which a copy stays here).

    Raises:
        HeadscopeError: no record there, one of another program or version, or parts that are damaged or incomplete.
    """
    return _record(local(path), contents=True).load()


def open_record(path: str | Path) -> xr.Dataset:
    """A record whose values are read from disk when they are used, from the parts that hold them.

    ``open_record(path)["entropy"].isel(example=5)`` reads one part; what is read is not kept (``.load()`` keeps it).

    Raises:
        HeadscopeError: as ``load_record``; a part that is damaged inside, when it is read.
    """
    return _record(local(path), contents=False)


def _record(path: Path, *, contents: bool) -> xr.Dataset:
    manifest = _manifest(path)
    parts = [_open(path, part, contents=contents) for part in manifest["parts"]]
    numbers = None
    if manifest.get("numbered"):
        numbers = np.concatenate([part["example"].to_numpy() for part in parts])
    record = join(parts, [path / part for part in manifest["parts"]], numbers)
    return record.assign_attrs(manifest.get("attrs", {}))


def each_part(path: str | Path) -> Iterator[xr.Dataset]:
    """A record's parts one after another, in memory only while they are used: for what has no room for the whole.

    A part's examples have the numbers of the prompts where a sweep wrote them, and are padded to their own longest.

    Raises:
        HeadscopeError: as ``load_record``.
    """
    path = local(path)
    for name in _manifest(path)["parts"]:
        part = _open(path, name, contents=True)
        yield join([part], [path / name], None).assign_coords(example=part["example"]).load()


def part_examples(path: Path, part: str) -> list[int]:
    """The numbers of a part's examples."""
    numbers: list[int] = _open(path, part)["example"].to_numpy().tolist()
    return numbers


def _open(path: Path, part: str, *, contents: bool = False) -> xr.Dataset:
    """A part, its variables in the order they had: zarr lists them in any, and a Dataset's axes follow it."""
    try:
        order = check_part(path, part, contents=contents)
        found = xr.open_dataset(path / part, engine="zarr", consolidated=False, chunks=None, cache=False)
        data = {name: found.variables[name] for name in order if name in found.data_vars}
        coords = {name: found.variables[name] for name in order if name in found.coords}
        return xr.Dataset(data, coords, found.attrs)
    except Exception as error:
        raise damaged(path / part, error) from error


def _manifest(path: Path) -> dict[str, Any]:
    foreign = f"{path} is not a headscope record; pass the folder that save_record wrote"
    try:
        if not (path / MANIFEST).exists() and (path / SWEEP).exists():
            raise HeadscopeError(f"the sweep in {path} is not finished; run the same sweep again, and it will continue")
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        if manifest["kind"] != "headscope record" or not isinstance(manifest["parts"], list) or not manifest["parts"]:
            raise HeadscopeError(foreign)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadscopeError(foreign) from error
    if manifest.get("format") != FORMAT:
        raise HeadscopeError(f"{path} has record format {manifest.get('format')}; this version reads {FORMAT}")
    outside = [part for part in manifest["parts"] if not (isinstance(part, str) and PART.fullmatch(part))]
    if outside:
        raise HeadscopeError(f"{path / MANIFEST} names {outside[0]!r}, which is no part of a record; trace it again")
    try:
        return unsealed(manifest)
    except ValueError as error:
        raise HeadscopeError(f"{path / MANIFEST} is damaged ({error}); trace these examples again") from error
