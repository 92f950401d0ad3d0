"""Progress of long work, on stderr, only where someone is looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, *, enabled: bool = True, done: int = 0) -> Iterator[Item]:
    """Yield ``items`` behind a progress bar; ``done`` were finished before and are already gone from ``items``."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task(description, total=len(items) + done, completed=done)
        for item in items:
            yield item
            progress.advance(task)
