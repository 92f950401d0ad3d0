"""``headscope fit``: fit an edit to data and save it, for ``headscope evaluate --with``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.interp.cli.app import Device, Dtype, Json, Model, Run, Settings, app

DATA = (
    "JSON lines; iti: question, choices, labels (or text, label); lofit: prompt, response (or chosen, rejected); "
    "duo_attention: prompt, response, or the word passkeys."
)


@app.command()
def fit(
    kind: Annotated[str, typer.Argument(help="iti, lofit or duo_attention; `headscope list fits` names them.")],
    model: Model,
    data: Annotated[str, typer.Option("--data", "-d", help=DATA)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, for `headscope evaluate --with`.")],
    setting: Settings = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fit an edit to data and save it as one file, with a record of the fit beside it (OUT.json)."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import assignments
    from headscope.interp.registry import make
    from headscope.interventions.fitted import FITS
    from headscope.interventions.fitted.base import new_file

    chosen = make(FITS[kind], kind, assignments(setting or []))
    new_file(out)
    lm = Run(model, None, as_json, False, device, dtype).load()
    found = chosen.fit(lm, data)
    path = found.save(out, lm)
    if as_json:
        console.show_json({"file": str(path), **found.summary()})
    else:
        typer.echo(repr(found.edit))
        console.show_rows([{name: _short(value) for name, value in found.summary().items()}], f"fit {kind}", False)
        console.note(f"saved: {path}, and the record of the fit beside it ({path.name}.json)")


def _short(value: object) -> object:
    """A list of heads as the command line names them."""
    return ",".join(f"L{layer}H{head}" for layer, head in value) if isinstance(value, list) else value
