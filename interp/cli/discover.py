"""``headscope discover``: score every head by published methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from headscope.interp.results.scores import HeadScores


@app.command()
def discover(
    methods: Annotated[
        list[str], typer.Argument(help="Head methods, as `headscope list methods` names them; or cache, alone.")
    ],
    model: Model,
    out: Out = None,
    lengths: Lengths = None,
    depths: Depths = None,
    samples: Annotated[int | None, typer.Option("--samples", help="How many samples to draw.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Use this text file instead of the bundled one.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Chats with pictures (a folder of images, or .jsonl with 'image' and 'text'); "
            "cache: prompts, a line each, or .jsonl.",
        ),
    ] = None,
    policies: Annotated[str | None, typer.Option("--policies", help="cache: policies, e.g. snapkv,h2o.")] = None,
    budgets: Annotated[str | None, typer.Option("--budgets", help="cache: keys or shares, e.g. 128,256,0.1.")] = None,
    seed: Seed = 0,
    top: Top = 10,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score every head by published methods, with confidence intervals; methods share forward passes where they can.

    `discover cache` measures what policies for a cache would lose (`headscope list policies`), exactly, head by head.
    """
    if "cache" in methods or (policies, budgets) != (None, None):
        return _cache(
            Run(model, out, as_json, dry_run, device, dtype),
            methods,
            policies,
            budgets,
            data,
            {"lengths": lengths, "depths": depths, "samples": samples, "text": text, "set": setting},
        )
    from headscope.interp.heads import METHODS

    METHODS.check(methods)  # before anything slow is imported
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import for_methods, left_out
    from headscope.interp.heads.discovery import discover as run_discovery
    from headscope.interp.registry import make
    from headscope.interp.runs import estimate

    run = Run(model, out, as_json, dry_run, device, dtype)
    given: dict[str, Any] = {"lengths": lengths, "depths": depths, "samples": samples, "text": text, "data": data}
    given |= {"seed": seed, "set": setting}
    classes = {name: METHODS[name] for name in methods}
    settings = for_methods(classes, given)
    chosen = [make(cls, name, settings[name]) for name, cls in classes.items()]
    for line in left_out(classes, given):
        console.note(line)
    lm = run.load()
    if dry_run:
        with estimate.dry_run() as work:
            run_discovery(chosen, lm, out=out)
        return run.show_estimate(lm, work)
    found = run_discovery(chosen, lm, out=out)
    for name, own in settings.items():
        run.save_config(f"discover {name}", own)
    if as_json:
        shown = [_document(scores) for scores in found]
        console.show_json(shown[0] if len(shown) == 1 else {"methods": shown})
        return
    for scores in found:
        best, made = scores.to_frame().head(top).to_dict("records"), scores.provenance
        kept = f"{made['kept']} of {made['trials']} trials kept" + _reliability(scores)
        if made.get("note"):
            console.note(f"{scores.method}: {made['note']}")
        console.show_rows(best, f"{scores.method}: top {len(best)} of {scores.mean.size} heads, {kept}", False)


def _cache(
    run: Run, methods: list[str], policies: str | None, budgets: str | None, data: Path | None, given: dict[str, Any]
) -> None:
    from headscope.interp.cli.cache import discover_cache
    from headscope.interp.errors import HeadscopeError

    if methods != ["cache"]:
        raise HeadscopeError("--policies, --budgets and --data are of `discover cache`, which runs by itself")
    discover_cache(run, policies, budgets, data, given)


def _document(scores: HeadScores) -> dict[str, object]:
    heads = scores.to_frame().to_dict("records")
    return {"method": scores.method, "heads": heads, "provenance": scores.provenance}


def _reliability(scores: HeadScores) -> str:
    """``, split-half reliability 0.93 over 20 trials``, or nothing where trials cannot be halved."""
    from headscope.interp.analysis.reliability import split_half
    from headscope.interp.errors import HeadscopeError

    try:
        return f", {split_half(scores).words()}"
    except HeadscopeError:
        return ""
