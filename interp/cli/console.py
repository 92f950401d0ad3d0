"""What commands print: tables for people on a terminal, JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def as_row(entry: Any) -> dict[str, Any]:
    """A dataclass as a row."""
    return dict(dataclasses.asdict(entry))


def show_rows(rows: Sequence[dict[str, Any]], title: str, as_json: bool, *, key: str | None = None) -> None:
    """Print rows as a table, or as JSON under ``key`` (default: the title)."""
    if as_json:
        show_json({key or title: list(rows)})
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row[name], int | float) for row in rows)
        table.add_column(str(name).replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    # piped output is not a terminal 80 columns wide: give it room instead of folding every cell
    Console(width=None if console.is_terminal else 160).print(table)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-3 and value else f"{value:.3f}"
    return str(value).replace("[", r"\[")  # rich reads brackets as markup


def show_json(document: Any) -> None:
    """Print JSON on stdout; numbers that JSON lacks become null."""
    json.dump(_plain(document), sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    Console(stderr=True).print(text, markup=False, highlight=False)
