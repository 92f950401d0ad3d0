"""A page for everything that can be named, from registry and docstring (``headscope list --write docs/catalogue``).

The folder has one folder a registry: ``index.md``, a page of its own text with the table between two marks, and one
page an entry, which is written whole.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from headscope.interp.registry import Registry, summary
from headscope.interp.reports.catalogue_pictures import pictures, section
from headscope.interp.reports.tables import cell, rewritten
from headscope.interp.reports.usage import use
from headscope.interp.runs.files import write_atomically

WRITTEN = "<!-- written by `headscope list --write docs/catalogue`: change the docstring, not this page -->"
LIMIT = "What it does not show:"
_HIGH = {
    ("methods", True): "more of what the method is named after",
    ("methods", False): "less of what the method is named after",
    ("tasks", True): "better",
    ("tasks", False): "worse",
}
_ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")
_DOI = re.compile(r"\bdoi[: ](10\.\d{4,}/[^\s,;]+)")


def pages(registries: Mapping[str, Registry[Any]], shown: Mapping[str, str]) -> dict[str, str]:
    """Every entry's page by its path below the catalogue, ``"methods/induction.md"``; ``shown``: its ``pictures``."""
    found = {}
    for group, registry in registries.items():
        for row in registry.rows():
            found[f"{group}/{row['name']}.md"] = entry(registry, row, shown)
    return found


def write(folder: Path, registries: Mapping[str, Registry[Any]]) -> None:
    """Write every page below ``folder``, its index pages' tables anew, and remove pages of what is not there any more.

    A registry's index page keeps its own text; where there is none it begins with a title alone.
    """
    made = pages(registries, pictures(folder))
    for group, registry in registries.items():
        index = folder / group / "index.md"
        begin = index.read_text(encoding="utf-8") if index.exists() else blank(group)
        made[f"{group}/index.md"] = rewritten(begin, {group: registry}, linked=True)
    for path, text in made.items():
        write_atomically(folder / path, text.encode())
    for old in stale(folder, made):
        old.unlink()


def stale(folder: Path, made: Iterable[str]) -> list[Path]:
    """Written pages below ``folder`` that are none of ``made``."""
    known = {folder / path for path in made}
    return sorted(p for p in folder.glob("*/*.md") if p not in known and p.read_text("utf-8").startswith(WRITTEN))


def blank(group: str) -> str:
    """An index page without text of its own."""
    return f"# {group.capitalize()}\n\n<!-- {group}: written by `headscope list --write` -->\n<!-- end of {group} -->\n"


def entry(registry: Registry[Any], row: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    """The page of one entry, from its row of the registry and its class, with its picture where there is one."""
    cls = registry[row["name"]]
    told, limits = _body(cls)
    example = use(registry.group, row["name"], cls)
    commands = _code("sh", "\n".join(example.commands)) if example.commands else []
    refused = [f"- **{where}**: {why}" for where, why in row["refused"].items()]
    for field, more in getattr(cls, "refused_with", {}).items():
        refused += [f"- **{where}**, with `{field}`: {why}" for where, why in more.items()]
    parts = [
        WRITTEN,
        f"# {row['name']}",
        f"{row['summary']}.",
        _facts(registry, row, cls),
        *_section("Definition", told),
        *_section("What it does not show", limits),
        *_section("Picture", section(registry.group, row["name"], shown)),
        *_section("Use", [*commands, *_code("python", example.python)]),
        *_section("Settings", _settings(row["settings"])),
        *_section("Refused", ["\n".join(refused)] if refused else []),
        *_section("Held to", _reproduction(cls)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, body: list[str]) -> list[str]:
    return [f"## {title}", *body] if body else []


def _code(language: str, text: str) -> list[str]:
    return [f"```{language}\n{text}\n```"]


def _facts(registry: Registry[Any], row: Mapping[str, Any], cls: type) -> str:
    """What class variables say, as a table of two columns."""
    between = getattr(cls, "range", None)
    high = _HIGH.get((registry.group, row["higher_is_better"]), "")
    units = getattr(cls, "units", None)
    more = [f"`{name}`: {unit}" for name, unit in units.items()] if isinstance(units, Mapping) else []
    facts = {
        "kind": registry.kind,
        "unit": "; ".join([row["unit"], *more]) if more else row["unit"],
        "range": "" if between is None else f"{between[0]:g} to {between[1]:g}",
        "a high number": high,
        "a number is of": f"a {cls.per}" if hasattr(cls, "per") and registry.group == "methods" else "",
        "patterns a head": str(cls.maps) if hasattr(cls, "maps") else "",
        "reads": {"images": "images and text", "text": "text"}.get(getattr(cls, "reads", ""), ""),
        "source": _linked(row["source"]),
        "class": f"`{cls.__module__}.{row['class']}`",
        "file": f"`{row['file']}`",
    }
    lines = ["| | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {cell(value)} |" for name, value in facts.items() if value])


def _linked(source: str) -> str:
    found = _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", source)
    return _DOI.sub(r"[doi:\1](https://doi.org/\1)", found)


def _body(cls: type) -> tuple[list[str], list[str]]:
    """The docstring's paragraphs after the first sentence, and of them those that say what is not shown."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0].strip()
    paragraphs = [_flowing(part) for part in re.split(r"\n\s*\n", text)]
    rest = paragraphs[1:]
    first = " ".join(paragraphs[0].split())
    beyond = first[len(summary(cls)) :].lstrip(".: ")
    told = [beyond] if beyond else []
    limits = []
    for part in rest:
        before, mark, after = part.partition(LIMIT)
        told += [before.rstrip()] if before.strip() else []
        limits += [after.strip()[:1].upper() + after.strip()[1:]] if mark else []
    return told, limits


def _flowing(paragraph: str) -> str:
    """A paragraph on one line, so that no line of it begins like a list; lists and formulas stay as they are."""
    if re.match(r"( {4}|[-*] |\d+\. )", paragraph):
        return paragraph
    return " ".join(paragraph.split())


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for one in rows:
        default = "*has to be given*" if one["required"] else f"`{one['default']!r}`"
        kind = one["type"].replace(" | ", " or ")
        lines.append(f"| `{one['name']}` | {cell(f'`{kind}`')} | {cell(default)} | {cell(one['meaning'])} |")
    return ["\n".join(lines)]


def _reproduction(cls: type) -> list[str]:
    told = {name: getattr(cls, name, "") for name in ("tests", "reproduced", "not_reproduced")}
    if not told["tests"]:
        return []
    lines = [f"- Tests: `tests/interp/{told['tests']}`", f"- Reproduced: {told['reproduced']}."]
    return ["\n".join(lines + ([f"- Not reproduced: {told['not_reproduced']}."] if told["not_reproduced"] else []))]
