"""``headscope explore``: every head on one text as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Device, Dtype, Json, Model, Run, app
from headscope.interp.cli.intervene import HEADS

if TYPE_CHECKING:
    from headscope.interp.explorer.run import Prompt


@app.command()
def explore(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the model reads.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="A file with the prompt, instead of --prompt.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture that --prompt asks about; repeatable.")
    ] = None,
    generate: Annotated[int, typer.Option("--generate", help="Tokens that the model adds, shown as a time line.")] = 0,
    beside: Annotated[str | None, typer.Option("--beside", help="A second prompt, side by side.")] = None,
    edit: Annotated[
        list[Path] | None, typer.Option("--with", help="A saved edit: the second run is under it; repeatable.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="Head scores to show in the overview; repeatable.")
    ] = None,
    heads: Annotated[str | None, typer.Option("--heads", help=f"Heads to keep down to single weights: {HEADS}")] = None,
    top: Annotated[int, typer.Option("--top", help="Of head scores: how many of the highest.")] = 8,
    layers: Annotated[str | None, typer.Option("--layers", help="Only these layers, e.g. 0,5,11.")] = None,
    statistics: Annotated[
        str | None, typer.Option("--statistics", "-s", help="Further statistics, comma-separated.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Megabytes that the page may take.")] = 6.0,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write a page on which every head of a model can be looked at, from an overview down to single weights.

    The page opens offline and says what it had to leave out; in a notebook `explore` leaves out nothing.
    """
    from headscope.interp.cli import console
    from headscope.interp.cli.intervene import head_set
    from headscope.interp.cli.settings import numbers
    from headscope.interp.cli.trace import named_statistics
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.explorer import Explorer, record_run
    from headscope.interp.results.scores import HeadScores

    if beside is not None and edit:
        raise HeadscopeError("--beside and --with both name the second run: give one of them")
    asked = _prompt(prompt, text, image or [])
    kept: dict[str, Any] = {
        "generate": generate,
        "layers": None if layers is None else numbers(layers, int, "--layers"),
        "statistics": None if statistics is None else named_statistics(statistics),
    }
    chosen = None if heads is None else head_set(heads, top)[0]
    given = [HeadScores.load(path) for path in scores or ()]
    lm = Run(model, out, as_json, False, device, dtype).load()
    run = record_run(lm, asked, **kept)
    second = None
    if beside is not None:
        run.name = "first prompt"
        second = record_run(lm, _prompt(beside, None, image or []), name="second prompt", **kept)
    elif edit:
        from headscope.interventions import apply, load_intervention

        run.name = "no edit"
        with apply(lm, *(load_intervention(file, lm) for file in edit)):
            second = record_run(lm, asked, name=", ".join(file.stem for file in edit), **kept)
    path = Explorer(run, second, scores=given, title=lm.name).save(out, budget_mb=budget, heads=chosen)
    size = path.stat().st_size
    if as_json:
        console.show_json({"page": str(path), "bytes": size, "tokens": len(run.tokens)})
    else:
        console.note(f"page: {path} ({size / 1e6:.1f} MB, {len(run.tokens):,} tokens)")


def _prompt(prompt: str | None, text: Path | None, images: list[Path]) -> Prompt:
    """What is read: a text, a file's, or a question about pictures."""
    from headscope.interp.cli.settings import read_text
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.prompts.vision_data import ask

    if (prompt is None) == (text is None):
        raise HeadscopeError("give the prompt by --prompt, or as a file by --text")
    if text is not None:
        prompt = read_text(text)
    assert prompt is not None
    return ask(list(images), prompt) if images else prompt
