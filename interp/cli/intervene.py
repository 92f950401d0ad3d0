"""``headscope intervene``: build one edit and save it, for ``headscope evaluate --with``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headscope.interp.cli.app import Device, Dtype, Json, Model, Run, Settings, app

if TYPE_CHECKING:
    from headscope.interp.results.headset import HeadSet
    from headscope.interp.results.scores import HeadScores

HEADS = "Head scores (folder, JSON, or of Retrieval_Head), a saved HeadSet (JSON), or heads such as L18H6,L17H3."


@app.command()
def intervene(
    kind: Annotated[str, typer.Argument(help="An edit or a decoding; `headscope list` names them.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, for `headscope evaluate --with`.")],
    heads: Annotated[str | None, typer.Option("--heads", help=HEADS)] = None,
    top: Annotated[int, typer.Option("--top", help="Of head scores: how many of the highest.")] = 10,
    setting: Settings = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Text to measure means and the like over (default: bundled).")
    ] = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Build an edit of a model and save it as one file.

    Tensors are named by safetensors file (``--set vectors=FILE.safetensors:NAME``) or measured on --reference
    (``--set how=mean``, ``how=resample``) or another prompt (``patch-heads --set prompt=...``).
    """
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import assignments, passages
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.registry import make
    from headscope.interventions.applying import apply
    from headscope.interventions.load import named
    from headscope.interventions.tensors import with_tensors

    cls = named(kind)
    given = with_tensors(cls, assignments(setting or []))
    if heads is not None:
        given["heads"] = head_set(heads, top)[0]
    if out.is_dir():
        raise HeadscopeError(f"{out} is a folder; --out names the file to write")
    if out.exists():
        raise HeadscopeError(f"{out} exists already: name another file, or remove it first")
    texts = passages(reference)
    lm = Run(model, None, as_json, False, device, dtype).load()
    edit = make(cls, kind, {**given, **cls.measured(lm, given, texts)})
    with apply(lm, edit):  # what the model lacks is refused now, not when it is evaluated
        pass
    path = edit.save(out, lm)
    if as_json:
        console.show_json({"file": str(path), **edit.describe()})
    else:
        typer.echo(repr(edit))
        console.note(f"saved: {path}")


def head_set(given: str, top: int) -> tuple[HeadSet, HeadScores | None]:
    """Heads as the command line names them: the ``top`` of head scores (and these), a saved HeadSet, or names.

    Head scores may also be a head list of Retrieval_Head.

    Raises:
        HeadscopeError: none of these.
    """
    from headscope.interp.results.headlists import from_retrieval_head, is_retrieval_head
    from headscope.interp.results.headset import HeadSet
    from headscope.interp.results.scores import HeadScores

    path = Path(given)
    named = not path.exists() and not path.suffix and "/" not in given and any(c.isdigit() for c in given)
    if named or "," in given:
        return HeadSet.of(given), None
    if path.is_file() and is_retrieval_head(path):
        scores = from_retrieval_head(path)
        return scores.top(top), scores
    if path.is_file() and path.suffix == ".json" and not path.with_suffix(".parquet").exists():
        return HeadSet.load(path), None
    scores = HeadScores.load(path)
    return scores.top(top), scores
