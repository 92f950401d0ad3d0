"""``headscope compare``: methods on one model, or one method on several models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headscope.interp.cli.app import Json, Out, Seed, Top, app

if TYPE_CHECKING:
    from headscope.interp.analysis.comparison import Comparison
    from headscope.interp.results.scores import HeadScores


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `discover`, or its METHOD.json files.")],
    out: Out = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Highest heads to compare (default: 20, at most a quarter of all).")
    ] = None,
    permutations: Annotated[
        int | None, typer.Option("--permutations", help="Shuffles of every null (default: 2,000, or 50 a pair).")
    ] = None,
    top: Top = 10,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare one method between runs (models, checkpoints), or all methods on one model, beside permutation nulls."""
    from headscope.interp.analysis.comparison import compare as run_compare
    from headscope.interp.cli import console

    found = run_compare(read(runs), k=k, permutations=permutations, seed=seed)
    if out is not None:
        from headscope.interp.reports.comparison import comparison_page

        page = comparison_page(found)  # before anything is written
        found.save(out)
        console.note(f"report: {page.save(out / 'compare.html')}")
    if as_json:
        console.show_json(found.document())
    else:
        _show(found, top)


def read(runs: list[Path]) -> dict[str, list[HeadScores]]:
    """Head scores by the folder that they are in.

    Raises:
        HeadscopeError: a folder that holds none, or a file that is none.
    """
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.results.scores import HeadScores, find_all

    found: dict[str, list[HeadScores]] = {}
    for path in dict.fromkeys(runs):
        inside = find_all(path) if path.is_dir() else {path.name: HeadScores.load(path)}
        if not inside:
            raise HeadscopeError(f"{path} holds no head scores; run `headscope discover METHOD --out {path}` first")
        for place, one in inside.items():
            folder = (path if path.is_dir() else path.parent) / Path(place).parent
            found.setdefault(str(folder), []).append(one)
    return found


def _show(found: Comparison, top: int) -> None:
    from headscope.interp.cli import console

    pairs = found.pairs()
    if len(pairs):
        columns = {"p_holm": "p (Holm)"} if found.agreement is not None else {}
        shown = pairs.drop(columns=["p"] if columns else ["p_holm"]).rename(columns=columns)
        k = (found.agreement or found.differences[0].agreement).k
        title = f"agreement, jaccard and shared of the top {k}, nulls of shuffled scores with 95 % intervals"
        console.show_rows(shown.to_dict("records"), title, False)
    for one in found.differences:
        rows = one.to_frame().head(top).to_dict("records")
        title = f"{one.method}, {one.names[0]} to {one.names[1]}: {one.words()}; the largest changes"
        console.show_rows(rows, title, False)
    if found.agreement is not None:
        console.show_rows(found.agreement.ranks(3).head(top).to_dict("records"), "ranks by every method", False)
    if len(found.depth):
        console.show_rows(found.depth.to_dict("records"), "by relative depth", False)
    for note in found.notes:
        console.note(note)
