"""What the site takes from outside ``docs/`` (hooks of mkdocs): pages of the repository that the documentation links
to, notebooks as pages, the public names of the rooms, and which pages a folder of the navigation has.

Pages link to files where they lie, so that links work in the repository as well; here they become links within the
site. A link to a file that is no page of the site is left as its text.
"""

from __future__ import annotations

import ast
import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
READ = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "interp/heads/README.md",
    "interp/laboratory/README.md",
    "interp/survey/SUPPORT.md",
    "kernels/benchmarks/README.md",
    "notebooks/*.ipynb",
)
IMAGES = ("notebooks/images/*.png", "kernels/benchmarks/results/*.svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
NAMES = re.compile(r"<!-- names of headscope\.(\w+) -->")


def place(path: str) -> str:
    """Where the site has a file of the repository; "" where it has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if any(fnmatch(path, pattern) for pattern in (*READ, *IMAGES)):
        return f"repository/{path}".replace(".ipynb", ".md")
    return ""


def on_config(config: Any) -> Any:
    """A folder of the navigation becomes its pages, in the order in which its index names them."""
    config.nav = [expanded(item) for item in config.nav]
    return config


def expanded(item: Any) -> Any:
    """An item of the navigation with every folder below it as a list of pages."""
    if isinstance(item, dict):
        return {title: expanded(value) for title, value in item.items()}
    if isinstance(item, list):
        return [expanded(each) for each in item]
    if not item.endswith("/"):
        return item
    index = (ROOT / "docs" / item / "index.md").read_text(encoding="utf-8")
    return [f"{item}index.md", *(item + name for name in re.findall(r"\]\((\w+\.md)\)", index))]


def on_files(files: Files, config: Any) -> Files:
    """The repository's pages, notebooks and images join those of ``docs/``."""
    for pattern in (*READ, *IMAGES):
        for path in sorted(ROOT.glob(pattern)):
            where = place(path.relative_to(ROOT).as_posix())
            if path.suffix in (".md", ".ipynb"):
                text = path.read_text(encoding="utf-8")
                content = notebook(text) if path.suffix == ".ipynb" else text
                files.append(File.generated(config, where, content=content))
            else:
                files.append(File.generated(config, where, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links and names of one page."""
    source = page.file.src_uri
    here = source.removeprefix("repository/") if source.startswith("repository/") else f"docs/{source}"

    def lead(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        there = os.path.normpath(os.path.join(os.path.dirname(here), path))
        if not (ROOT / there).exists():
            return match[0]
        if not (found := place(there)):
            return text
        return f"{image}[{text}]({os.path.relpath(found, os.path.dirname(source) or '.')}{mark}{anchor})"

    return NAMES.sub(lambda match: "\n\n".join(names(match[1])), LINK.sub(lead, markdown))


def names(room: str) -> list[str]:
    """A directive for every public name of a room, from the table in its ``__init__.py``, by where it lies."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    home = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME"
    )
    return [f"::: headscope.{room}.{module}.{name}" for module, name in sorted((m, n) for n, m in home.items())]


def notebook(text: str) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            said = output.get("text") or output.get("data", {}).get("text/plain", ())
            parts += [f"```text\n{''.join(said).rstrip()}\n```"] if said else []
    return "\n\n".join(parts) + "\n"
