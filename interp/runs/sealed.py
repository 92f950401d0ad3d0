"""Result files that notice when they were changed: JSON with its checksum, and those of the files beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headscope.interp.runs.files import write_atomically

SEAL = "sha256"


def sealed(document: Mapping[str, Any]) -> bytes:
    """A JSON object that holds ``document`` and the SHA-256 of its contents, as bytes to be written."""
    return json.dumps(_sealed(document), indent=1).encode()


def sealed_line(document: Mapping[str, Any]) -> bytes:
    """The same on one line that ends."""
    return json.dumps(_sealed(document)).encode() + b"\n"


def unsealed(document: Any) -> dict[str, Any]:
    """What ``sealed`` was given, from the parsed file.

    Raises:
        ValueError: not an object that ``sealed`` wrote, or its contents were changed since.
    """
    if not isinstance(document, dict):
        raise ValueError("it holds no JSON object")
    held = {key: value for key, value in document.items() if key != SEAL}
    if document.get(SEAL) != _digest(held):
        raise ValueError("it was changed after it was written")
    return held


def _sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    held = json.loads(json.dumps(document))  # as it will be read: text for keys, lists for tuples
    return {**held, SEAL: _digest(held)}


def _digest(held: dict[str, Any]) -> str:
    return sha256(json.dumps(held, sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """The SHA-256 of ``data`` in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def write_results(path: Path, document: Mapping[str, Any], beside: Mapping[str, bytes]) -> None:
    """Write the files ``beside`` (name -> contents) into ``path``'s folder, then ``document``, sealed, as ``path``.

    Each is written atomically. A process killed in between leaves an old document whose checksums do not fit.
    """
    for name, data in beside.items():
        write_atomically(path.parent / name, data)
    files = {name: sha256(data) for name, data in beside.items()}
    write_atomically(path, sealed({**document, "files": files}))


def read_beside(path: Path, document: Mapping[str, Any], name: str) -> bytes:
    """The contents of a file that was written beside ``path``, whose unsealed contents are ``document``.

    Raises:
        OSError: it is gone.
        ValueError: it is not the file that ``path`` was written with.
    """
    data = (path.parent / name).read_bytes()
    if sha256(data) != document["files"][name]:
        raise ValueError(f"{name} is not the file that it was written with")
    return data
