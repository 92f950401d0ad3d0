"""Tables of the registries in Markdown, and pages that hold them between two marks (``headscope list --write``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import Registry

_BLOCK = re.compile(r"<!-- (\w+): written by [^>]*-->\n.*?<!-- end of \1 -->", re.DOTALL)


def table(registry: Registry[Any]) -> str:
    """Name, what it is, unit and source of every entry, as a Markdown table."""
    lines = [f"| {registry.kind} | | unit | source |", "|---|---|---|---|"]
    for row in registry.rows():
        cells = [f"`{row['name']}`", row["summary"], row["unit"], row["source"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def block(registry: Registry[Any]) -> str:
    """The table between its marks."""
    group = registry.group
    begin = f"<!-- {group}: written by `headscope list --write README.md` -->"
    return f"{begin}\n{table(registry)}\n<!-- end of {group} -->"


def rewritten(page: str, registries: Mapping[str, Registry[Any]]) -> str:
    """``page`` with every block between marks of a registry's name made anew; others stay.

    Raises:
        HeadscopeError: the page has the marks of no registry.
    """
    found: set[str] = set()

    def anew(match: re.Match[str]) -> str:
        registry = registries.get(match[1])
        found.update([match[1]] if registry is not None else [])
        return match[0] if registry is None else block(registry)

    made = _BLOCK.sub(anew, page)
    if not found:
        marks = ", ".join(f"<!-- {group}: written by ... --> ... <!-- end of {group} -->" for group in registries)
        raise HeadscopeError(f"the page has no place for a table; give it {marks}")
    return made
