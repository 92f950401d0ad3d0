"""What a part of a record consists of: its files with their sizes and checksums, in ``checksums/PART.json``.

zarr reads a chunk that is not there as missing values, and cannot tell a changed one. The list is written before the
part gets its name, so that a part without one does not exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.sealed import sealed, unsealed

FOLDER = "checksums"
METADATA = "zarr.json"  # what zarr calls the description of an array or a group


def write_checksums(path: Path, part: str, unfinished: Path, variables: Sequence[str]) -> None:
    """List the files and variables of ``unfinished``, which becomes ``part`` of the record at ``path``."""
    files = {name: [size, _sha256(unfinished / name)] for name, size in _sizes(unfinished).items()}
    write_atomically(path / FOLDER / f"{part}.json", sealed({"variables": list(variables), "files": files}))


def check_part(path: Path, part: str, *, contents: bool) -> list[str]:
    """Compare a part with its list: names, sizes and metadata; with ``contents`` every byte. Its variables, in order.

    Raises:
        OSError, ValueError, KeyError, TypeError: a file is gone, added or changed, or there is no list.
    """
    held: dict[str, Any] = unsealed(json.loads((path / FOLDER / f"{part}.json").read_bytes()))
    sizes = _sizes(path / part)
    for name, (size, digest) in held["files"].items():
        if sizes.pop(name, None) != size:
            raise ValueError(f"{name} is not of {size} bytes")
        if (contents or name.endswith(METADATA)) and _sha256(path / part / name) != digest:
            raise ValueError(f"{name} was changed")
    if sizes:
        raise ValueError(f"{min(sizes)} was added")
    return list(held["variables"])


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
