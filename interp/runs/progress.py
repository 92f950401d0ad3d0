"""Progress of long work, on stderr, only where someone is looking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, enabled: bool = True, done: int = 0, total: int | None = None
) -> Iterator[Item]:
    """Yield ``items``, ``total`` of them where they have no length, behind a progress bar; ``done`` were finished
    before and are already gone from ``items``."""
    left = len(items) if isinstance(items, Sized) else total or 0
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        task = progress.add_task(description, total=left + done, completed=done)
        for item in items:
            yield item
            progress.advance(task)
