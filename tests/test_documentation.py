"""The documentation holds together: links lead somewhere, pages of the registries are those that the code gives, and
every command and every import that a page shows is one that there is. It needs no mkdocs.
"""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml

from headscope.interp.cli import COMMANDS
from headscope.interp.cli.app import app
from headscope.interp.cli.listing import registries
from headscope.interp.cli.settings import assignments
from headscope.interp.registry import Registry, settings
from headscope.interp.reports import catalogue
from headscope.interp.reports.catalogue_pictures import SKIPPED
from headscope.interp.reports.tables import rewritten

ROOT = Path(__file__).parent.parent
CATALOGUE = ROOT / "docs/catalogue"
BESIDE = ("README.md", "CONTRIBUTING.md", "interp/heads/README.md", "interp/laboratory/README.md")
PAGES = [*(ROOT / name for name in BESIDE), *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code and its code in lines."""
    return re.sub(r"``.*?``|`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def slugs(page: Path) -> set[str]:
    """The anchors of a page's titles that GitHub and Python-Markdown make alike."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[^\w\s-]", "", title).lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    ours = {title.replace(" ", "-") for title in titles}
    return ours & {re.sub(r"[-\s]+", "-", title.strip()) for title in titles}


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in slugs(there)):
            found.append(target)
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Registry[Any]]:
    return registries()


@pytest.fixture(scope="module")
def made(known: dict[str, Registry[Any]]) -> dict[str, str]:
    return catalogue.pages(known, catalogue.pictures(CATALOGUE))


def test_links_lead_somewhere(tmp_path: Path) -> None:
    faults = {str(page.relative_to(ROOT)): found for page in PAGES if (found := broken(page))}
    assert not faults
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](no.md) [c](#no-title) `[d](no.md)` [e](https://example.org)\n")
    assert broken(page) == ["no.md", "#no-title"]


def test_every_page_can_be_reached() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        linked = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(page))}
        ahead += [each for each in linked if each.suffix == ".md" and each.exists() and each not in reached]
    assert not {str(page) for page in PAGES if page not in reached}


def test_every_notebook_is_named() -> None:
    named = _read(ROOT / "docs/notebooks.md")
    assert [path.name for path in ROOT.glob("notebooks/*.ipynb") if path.name not in named] == []


def test_the_navigation_has_every_page(known: dict[str, Registry[Any]]) -> None:
    def places(item: Any) -> list[str]:
        values = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        return [item] if isinstance(item, str) else [place for value in values for place in places(value)]

    listed = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    folders = {f"catalogue/{group}/" for group in known}
    own = {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents}
    assert set(listed) == folders | {page for page in own if not page.startswith(tuple(folders))}


def test_the_catalogue_is_what_the_code_gives(known: dict[str, Registry[Any]], made: dict[str, str]) -> None:
    say = "run `headscope list --write docs/catalogue`"
    assert {path for path, text in made.items() if _read(CATALOGUE / path) != text} == set(), say
    for group, registry in known.items():
        page = _read(CATALOGUE / group / "index.md")
        assert rewritten(page, {group: registry}, linked=True) == page, say
    assert catalogue.stale(CATALOGUE, made) == [], say
    assert "methods/induction.md" in made and len(made) == sum(map(len, known.values()))


def test_a_page_has_what_a_reader_asks(known: dict[str, Registry[Any]], made: dict[str, str]) -> None:
    for group, registry in known.items():
        for row in registry.rows():
            page = made[f"{group}/{row['name']}.md"]
            assert f"# {row['name']}\n" in page and row["summary"] in page and "## Use\n" in page
            assert all(f"| `{one['name']}` |" in page for one in row["settings"])
            assert all(why in page for why in row["refused"].values())
            doc = registry[row["name"]].__doc__ or ""
            assert (catalogue.LIMIT in " ".join(doc.split())) == ("## What it does not show" in page)


def test_pictures_of_head_methods_are_shown_or_their_lack_explained(
    known: dict[str, Registry[Any]], made: dict[str, str]
) -> None:
    """A method that is newer than the pictures has neither; one that is gone has no file left."""
    shown = catalogue.pictures(CATALOGUE)
    files = {path.stem: path for path in (CATALOGUE / "methods/pictures").glob("*")}
    assert set(shown) == set(files) and not set(shown) & set(SKIPPED)
    assert set(shown) | set(SKIPPED) <= set(known["methods"]) and len(shown) > 25
    assert sum(path.stat().st_size for path in files.values()) < 3e6
    for name, path in files.items():
        root = ElementTree.fromstring(path.read_bytes())
        assert root.tag.endswith("svg") and {one.tag.rpartition("}")[2] for one in root} == {"text", "rect"}
        assert f"](pictures/{name}.svg)" in made[f"methods/{name}.md"] and shown[name] in made[f"methods/{name}.md"]
    assert all(f"No picture: {why}." in made[f"methods/{name}.md"] for name, why in SKIPPED.items())


def test_what_is_not_there_any_more_loses_its_page(known: dict[str, Registry[Any]], tmp_path: Path) -> None:
    old, own = tmp_path / "fits/old.md", tmp_path / "fits/own.md"
    old.parent.mkdir()
    old.write_text(f"{catalogue.WRITTEN}\n# old\n"), own.write_text("# somebody's own\n")
    catalogue.write(tmp_path, {"fits": known["fits"]})
    assert not old.exists() and own.exists() and (tmp_path / "fits/iti.md").exists()
    assert "[`iti`](iti.md)" in _read(tmp_path / "fits/index.md")


# -- commands and Python -----------------------------------------------------------------------------------------------


def shell(page: Path) -> Iterator[str]:
    """The commands of ``headscope`` that a page shows, in blocks of either kind."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = [body for language, body in FENCE.findall(text) if language == "sh"]
    blocks += re.findall(r"^    headscope .*$", FENCE.sub("", text), re.MULTILINE)
    for line in "\n".join(map(textwrap.dedent, blocks)).splitlines():
        if line.startswith("headscope ") and not line.endswith("..."):
            yield line


@pytest.fixture(scope="module")
def group() -> Any:
    for name in COMMANDS:
        import_module(f"headscope.interp.cli.{name}")
    return typer.main.get_command(app)


def fault(group: Any, known: dict[str, Registry[Any]], line: str) -> str:
    """What is wrong with a command: an option, a name, a setting; "" if nothing."""
    words = shlex.split(line, comments=True)[1:]
    try:
        command = group.commands[words[0]]
        given = command.make_context(words[0], list(words[1:])).params
    except Exception as error:  # click's errors are of classes that typer brings itself
        return f"{type(error).__name__}: {error}"
    return _misnamed(words[0], given, known)


def _misnamed(command: str, given: dict[str, Any], known: dict[str, Registry[Any]]) -> str:
    names: dict[str, list[str]] = {
        "methods": [x for x in given.get("methods") or [] if x != "cache"],
        "tasks": (given.get("task") or "").split(",") if command == "evaluate" else [],
        "fits": [given["kind"]] if command == "fit" else [],
        "policies": (given.get("policies") or "").split(",") if given.get("policies") else [],
        "statistics": (given.get("statistics") or "").split(",") if command == "trace" else [],
        "experiments": [given["name"]] if command == "lab" and given["name"] != "all" else [],
    }
    if command == "intervene":
        names["edits" if given["kind"] in known["edits"] else "decodings"] = [given["kind"]]
    missing = [name for kind, wanted in names.items() for name in wanted if name not in known[kind]]
    classes = [known[kind][name] for kind, wanted in names.items() for name in wanted if name in known[kind]]
    takes = {name for cls in classes for name in settings(cls)}
    more = [key for key in assignments(given.get("setting") or []) if classes and key not in takes]
    return f"unknown: {missing + more}" if missing or more else ""


def test_commands_are_commands(group: Any, known: dict[str, Registry[Any]]) -> None:
    lines = {line: page for page in PAGES for line in shell(page)}
    faults = {f"{page.name}: {line}: {found}" for line, page in lines.items() if (found := fault(group, known, line))}
    assert len(lines) > 100 and faults == set()
    assert "unknown" in fault(group, known, "headscope discover inductoin --model smollm2-135m")
    assert "unknown" in fault(group, known, "headscope evaluate needle --model smollm2-135m --set lenghts=1")
    assert fault(group, known, "headscope trace --model smollm2-135m --output runs/record")


def test_python_imports_what_there_is_and_makes_what_it_says() -> None:
    """Every block is read; its imports are carried out; of pages of the catalogue the entry's own object is made."""
    for page in PAGES:
        for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python" and not body.startswith("# "):  # CONTRIBUTING.md's files have a test of their own
                names = _imported(ast.parse(body))
                if CATALOGUE in page.parents and "my_task.yaml" not in body:  # a file of the reader's
                    _made(ast.parse(body), names, page)


def _imported(tree: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {"kept": object()}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: import_module(alias.name) for alias in node.names}
    return names


def _made(tree: ast.Module, names: dict[str, Any], page: Path) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and isinstance(names.get(node.func.id), type):
            eval(compile(ast.Expression(node), str(page), "eval"), names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "heads":
            assert callable(getattr(names["heads"], node.attr))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
