"""Tables of the registries in Markdown, and pages that hold them between two marks (``headscope list --write``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import Registry

_BLOCK = re.compile(r"<!-- (\w+): written by [^>]*-->\n.*?<!-- end of \1 -->", re.DOTALL)


def cell(text: str) -> str:
    """``text`` as it stands in a cell."""
    return text.replace("|", "\\|")


def table(registry: Registry[Any], linked: bool = False) -> str:
    """Name, what it is, unit and source of every entry, as a Markdown table; ``linked``: names lead to ``NAME.md``."""
    lines = [f"| {registry.kind} | | unit | source |", "|---|---|---|---|"]
    for row in registry.rows():
        name = f"[`{row['name']}`]({row['name']}.md)" if linked else f"`{row['name']}`"
        cells = [name, row["summary"], row["unit"], row["source"]]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def reproduction(registry: Registry[Any]) -> str:
    """Paper, file, tests, what was reproduced and what was not, of every head method, as a Markdown table."""
    lines = ["| method | paper | file | tests | reproduced | not reproduced |", "|---|---|---|---|---|---|"]
    for row in registry.rows():
        cls = registry[row["name"]]
        told = [getattr(cls, name, "") for name in ("tests", "reproduced", "not_reproduced")]
        cells = [f"`{row['name']}`", row["source"], row["file"], *told]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def blocks(registries: Mapping[str, Registry[Any]], linked: bool = False) -> dict[str, str]:
    """Every table by the name of its marks: a registry's, and ``reproduction``, of the head methods."""
    made = {name: table(registry, linked) for name, registry in registries.items()}
    if "methods" in registries:
        made["reproduction"] = reproduction(registries["methods"])
    return made


def rewritten(page: str, registries: Mapping[str, Registry[Any]], linked: bool = False) -> str:
    """``page`` with every block between marks of a table's name made anew; others stay. ``linked`` as of ``table``.

    Raises:
        HeadscopeError: the page has the marks of no table.
    """
    tables = blocks(registries, linked)
    found: set[str] = set()

    def anew(match: re.Match[str]) -> str:
        name = match[1]
        if name not in tables:
            return match[0]
        found.add(name)
        begin = match[0].partition("\n")[0]
        return f"{begin}\n{tables[name]}\n<!-- end of {name} -->"

    made = _BLOCK.sub(anew, page)
    if not found:
        marks = ", ".join(f"<!-- {name}: written by ... --> ... <!-- end of {name} -->" for name in tables)
        raise HeadscopeError(f"the page has no place for a table; give it {marks}")
    return made
