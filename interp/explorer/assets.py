"""The page's script and style: files of ``page/`` joined to one ES module, which loads nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
PARTS = ("base", "colour", "source", "heads", "map", "side", "token", "app")  # in this order


@cache
def script() -> str:
    """The ES module; its default export has ``render({model, el})``, as anywidget calls it."""
    return "\n".join((FOLDER / f"{part}.js").read_text(encoding="utf-8") for part in PARTS)


@cache
def style() -> str:
    """The style sheet; everything in it is below ``.headscope-explorer``."""
    return (FOLDER / "explorer.css").read_text(encoding="utf-8")
