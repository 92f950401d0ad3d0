"""Trials that survive a kill: a run's settings and its finished trials, one flushed line each.

A run is resumed by running it again with the same settings: finished trials are read back and skipped. A line that a
kill cut short is dropped and its trial runs again; a line that was changed is refused, by the checksum each carries.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.files import write_atomically, writing
from headscope.interp.runs.sealed import sealed_line, unsealed

Trial = dict[str, Any]  # what is run once, JSON-able


class Journal:
    """Finished trials of one run, by index. In memory only where ``path`` is None.

    Raises:
        HeadscopeError: the file belongs to a run with other settings, or is not a journal.
    """

    def __init__(self, path: str | Path | None, config: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.entries: dict[int, dict[str, Any]] = {}
        config = plain(config)
        if self.path is None:
            return
        if self.path.exists():
            self._read(config)
        else:
            write_atomically(self.path, sealed_line({"headscope_run": config}))

    def _read(self, config: dict[str, Any]) -> None:
        assert self.path is not None
        lines = self.path.read_bytes().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        try:
            found = dict(unsealed(json.loads(whole[0]))["headscope_run"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise HeadscopeError(f"{self.path} is not a run of headscope; choose another output folder") from error
        for number, line in enumerate(whole[1:], 2):
            try:
                entry = unsealed(json.loads(line))
                self.entries[int(entry["trial"])] = dict(entry["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise HeadscopeError(
                    f"line {number} of {self.path} is damaged; delete that line, and its trial runs again"
                ) from error
        if not self.entries and found != config:  # stopped before anything was finished: nothing of it is lost
            write_atomically(self.path, sealed_line({"headscope_run": config}))
            return
        require_same(self.path, found, config)
        if torn:
            with writing(self.path), open(self.path, "r+b") as file:
                file.truncate(self.path.stat().st_size - len(torn))

    def __contains__(self, trial: int) -> bool:
        return trial in self.entries

    def add(self, trial: int, result: dict[str, Any]) -> None:
        """Record a finished trial; on disk before this returns."""
        if self.path is not None:
            line = sealed_line({"trial": trial, "result": result})
            with writing(self.path), open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.entries[trial] = result


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, to be compared with those of an earlier run."""
    held: dict[str, Any] = json.loads(json.dumps(config, sort_keys=True, default=str))
    return held


def require_same(path: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse to continue a run whose settings ``found`` are not ``config``.

    Raises:
        HeadscopeError: names the settings that differ.
    """
    if found != config:
        changed = sorted(key for key in {*found, *config} if found.get(key) != config.get(key))
        raise HeadscopeError(
            f"{path} belongs to a run with other settings ({', '.join(changed)}); "
            "choose another output folder, or delete that file to start again"
        )
