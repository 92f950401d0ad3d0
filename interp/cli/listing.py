"""``headscope list``: every registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Json, app

if TYPE_CHECKING:
    from headscope.interp.registry import Registry


def registries() -> dict[str, Registry[Any]]:
    """Every registry by the name that ``headscope list`` takes."""
    from headscope.interp.cache import POLICIES
    from headscope.interp.heads import METHODS
    from headscope.interp.laboratory import EXPERIMENTS
    from headscope.interp.laboratory.variants import VARIANTS
    from headscope.interp.statistics import STATISTICS
    from headscope.interventions.decoding import DECODINGS
    from headscope.interventions.edits import EDITS
    from headscope.interventions.fitted import FITS
    from headscope.interventions.tasks import TASKS

    every = (METHODS, STATISTICS, POLICIES, EDITS, DECODINGS, FITS, TASKS, EXPERIMENTS, VARIANTS)
    return {registry.group: registry for registry in every}


@app.command("list")
def listing(
    what: Annotated[
        str | None,
        typer.Argument(help="methods, statistics, policies, edits, decodings, fits, tasks, experiments or variants."),
    ] = None,
    as_json: Json = False,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Make a Markdown page's tables of them, or a folder of pages, anew."),
    ] = None,
) -> None:
    """List what can be named: head methods, statistics, cache policies, edits, decodings, fits, tasks, experiments,
    attention variants."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import read_text
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.reports import catalogue
    from headscope.interp.reports.tables import rewritten
    from headscope.interp.runs.files import write_atomically

    known = registries()
    if write is not None and write.is_dir():
        return catalogue.write(write, known)
    if write is not None:
        return write_atomically(write, rewritten(read_text(write), known).encode())
    if what not in known:
        raise HeadscopeError(f"there is no list of {what!r}; choose {', '.join(known)}")
    rows = known[what].rows()
    if as_json:
        console.show_json({what: rows})
    else:
        shown = ("name", "summary", "unit", "source")
        console.show_rows([{key: row[key] for key in shown} for row in rows], what, False)
