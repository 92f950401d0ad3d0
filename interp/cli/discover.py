"""``headscope discover``: score every head by a published method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headscope.interp.cli.app import (
    Depths,
    Device,
    DryRun,
    Dtype,
    Json,
    Lengths,
    Model,
    Out,
    Run,
    Seed,
    Settings,
    Top,
    app,
)


@app.command()
def discover(
    method: Annotated[str, typer.Argument(help="A head method; `headscope list methods` names them.")],
    model: Model,
    out: Out = None,
    lengths: Lengths = None,
    depths: Depths = None,
    samples: Annotated[int | None, typer.Option("--samples", help="How many samples to draw.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Use this text file instead of the bundled one.")] = None,
    seed: Seed = 0,
    top: Top = 10,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score every head by a published method, with confidence intervals."""
    from headscope.interp import heads
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import keywords
    from headscope.interp.runs import estimate

    run = Run(model, out, as_json, dry_run, device, dtype)
    given = {"lengths": lengths, "depths": depths, "samples": samples, "text": text, "seed": seed, "set": setting or []}
    function = heads.method(method)
    settings = keywords(function, method, given)
    lm = run.load()
    if dry_run:
        with estimate.dry_run() as work:
            function(lm, out=out, **settings)
        return run.show_estimate(lm, work)
    scores = function(lm, out=out, **settings)
    run.save_config(f"discover {method}", settings)
    best = scores.to_frame().head(top).to_dict("records")
    made = scores.provenance
    title = (
        f"{scores.method}: top {len(best)} of {scores.mean.size} heads, {made['kept']} of {made['trials']} trials kept"
    )
    if as_json:
        console.show_json({"method": scores.method, "heads": scores.to_frame().to_dict("records"), "provenance": made})
    else:
        console.show_rows(best, title, False)
