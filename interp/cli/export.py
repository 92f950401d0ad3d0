"""``headscope export``: bake saved edits into an ordinary Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.interp.cli.app import Device, Dtype, Json, Model, Run, app


@app.command()
def export(
    edits: Annotated[list[Path], typer.Argument(help="Edits that `headscope intervene` saved, in their order.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint; new or empty.")],
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Bake edits that are linear in heads' outputs into a checkpoint whose logits are the edited model's."""
    from headscope.interp.cli import console
    from headscope.interventions import Composed, load_intervention
    from headscope.interventions import export as run_export

    lm = Run(model, None, as_json, False, device, dtype).load()
    edit = Composed([load_intervention(file, lm) for file in edits])
    path = run_export(lm, edit, out)
    if as_json:
        console.show_json({"folder": str(path), **edit.describe()})
    else:
        typer.echo(repr(edit))
        console.note(f"saved: {path}")
