"""Resumable loops: results of finished steps are kept as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headscope.interp.runs.files import locked
from headscope.interp.runs.journal import Journal
from headscope.interp.runs.progress import track


@contextmanager
def opened(path: Path | None, config: dict[str, Any]) -> Iterator[Journal]:
    """The journal of a run with settings ``config``, for this process alone; in memory only where ``path`` is None.

    Raises:
        HeadscopeError: another process writes it, or it belongs to a run with other settings.
    """
    with locked(path):
        yield Journal(path, config)


def run_steps(
    journal: Journal, count: int, step: Callable[[int], dict[str, Any]], label: str, *, progress: bool = True
) -> list[dict[str, Any]]:
    """Results of steps 0 to ``count - 1``: of finished ones from ``journal``, of the others from ``step``."""
    waiting = [index for index in range(count) if index not in journal]
    for index in track(waiting, label, enabled=progress, done=count - len(waiting)):
        journal.add(index, step(index))
    return [journal.entries[index] for index in range(count)]
