"""``headscope models``: what needs no hub, and whether a model can be traced."""

from __future__ import annotations

import typer

from headscope.interp.cli.app import Device, Dtype, Json, app

models_app = typer.Typer(help="Models known by name, and whether a model can be traced.")
app.add_typer(models_app, name="models")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that need no hub, and whether they are in the cache."""
    if context.invoked_subcommand is not None:
        return
    from headscope.interp.cli import console
    from headscope.interp.models import available_models

    console.show_rows([console.as_row(entry) for entry in available_models()], "models", as_json)


@models_app.command("check")
def models_check(name: str, as_json: Json = False, device: Device = None, dtype: Dtype = None) -> None:
    """Prove on the spot that our attention is the model's own, layer by layer."""
    from headscope.interp.cli import console
    from headscope.interp.models import load_model
    from headscope.interp.sites import verify

    lm = load_model(name, device=device, dtype=dtype)
    found = verify(lm)
    row = {
        "model": lm.name,
        "architecture": lm.info.architecture,
        "verified": found.passed,
        "calls": found.calls,
        "largest_difference": found.largest_difference,
        "share_of_bound": found.worst,
        "problems": "; ".join(found.problems),
    }
    console.show_rows([row], "verification", as_json)
    if not found.passed:
        raise typer.Exit(2)
