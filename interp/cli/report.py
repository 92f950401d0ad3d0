"""``headscope report``: a folder of results as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.interp.cli.app import Json, app


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of results; subfolders are read too.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file (default: FOLDER/report.html).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Also draw each method's top head on this prompt.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model for --prompt (default: the results').")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put results into one HTML page that opens offline, and print their summary."""
    from headscope.interp.cli import console
    from headscope.interp.cli.evaluate import show_evaluation
    from headscope.interp.reports.results import Results

    results = Results.find(folder)
    path = results.report(prompt, model).save(out or folder / "report.html")
    if as_json:
        console.show_json({"report": str(path), "summary": results.summary()})
        return
    console.show_rows(results.summary(), f"results in {folder}", False)
    for result in results.evaluations.values():
        show_evaluation(result, False)
    console.note(f"report: {path}")
