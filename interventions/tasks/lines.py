"""Data of tasks: bundled files, and JSON lines that a user gives."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError


def bundled(name: str) -> str:
    """The text of a file in ``tasks/data`` (its README says how each was made)."""
    return files("headscope.interventions.tasks").joinpath("data", name).read_text(encoding="utf-8")


def read(data: str | Path | None, name: str) -> str:
    """The text of a user's file, or of the bundled file ``name`` where there is none.

    Raises:
        HeadscopeError: a file that cannot be read.
    """
    if data is None:
        return bundled(name)
    try:
        return Path(data).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadscopeError(f"cannot read {data} ({error}); give a UTF-8 file of JSON lines") from error


def told(data: str | Path | None, name: str) -> dict[str, str]:
    """A file as a parameter: its name and the SHA-256 of its text."""
    digest = hashlib.sha256(read(data, name).encode()).hexdigest()
    return {"data": "bundled" if data is None else Path(data).name, "data_sha256": digest}


def json_lines(data: str | Path | None, name: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file, one a line, each with these fields.

    Raises:
        HeadscopeError: names the line that is none, or lacks a field; no line at all.
    """
    found = []
    for number, line in enumerate(read(data, name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            made = json.loads(line)
        except ValueError as error:
            raise HeadscopeError(f"line {number} of {data} is no JSON ({error})") from error
        missing = [field for field in fields if not isinstance(made, dict) or field not in made]
        if missing:
            raise HeadscopeError(f"line {number} of {data} has no {', '.join(missing)}: give {', '.join(fields)}")
        found.append(made)
    if not found:
        raise HeadscopeError(f"{data} is empty: give one JSON object a line with {', '.join(fields)}")
    return found
