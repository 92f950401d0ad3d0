"""``headscope mask``: the masking experiment of Wu et al. 2024."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.interp.cli.app import Depths, Device, DryRun, Dtype, Json, Lengths, Model, Out, Run, Seed, Settings, app
from headscope.interp.cli.intervene import HEADS


@app.command()
def mask(
    heads: Annotated[str, typer.Argument(help=HEADS)],
    model: Model,
    k: Annotated[str, typer.Option("--k", help="How many heads to mask, e.g. 5,10,30.")] = "5,10,30",
    scale: Annotated[str, typer.Option("--scale", help="small (for a CPU) or published (their lengths).")] = "small",
    random: Annotated[
        str, typer.Option("--random", help="published (of all heads) or others (none of the listed).")
    ] = "published",
    draws: Annotated[int, typer.Option("--draws", help="Random conditions for every k.")] = 1,
    out: Out = None,
    lengths: Lengths = None,
    depths: Depths = None,
    seed: Seed = 0,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Needle recall without the top k heads and without k random ones, as Wu et al. 2024 ran it."""
    from headscope.interp.cli import console
    from headscope.interp.cli.evaluate import show_evaluation
    from headscope.interp.cli.intervene import head_set
    from headscope.interp.cli.settings import asked, numbers
    from headscope.interp.registry import make
    from headscope.interp.runs import estimate
    from headscope.interventions.evaluation.arguments import overlap
    from headscope.interventions.evaluation.masking import LISTED, masking, needle_task
    from headscope.interventions.tasks.needle import NeedleTask

    run = Run(model, out, as_json, dry_run, device, dtype)
    ks = numbers(k, int, "--k")
    given = asked({"lengths": lengths, "depths": depths, "set": setting or []})
    make(NeedleTask, "the needle task", given)  # refuse before the model is loaded
    chosen, scores = head_set(heads, max([*ks, 1]))
    lm = run.load()
    task = needle_task(lm, scale, **given)  # type: ignore[arg-type]
    for warning in () if scores is None else overlap([task], lm, scores):
        console.note(f"warning: {warning}")
    arguments = {"task": task, "random": random, "draws": draws, "seed": seed, "out": out}
    if dry_run:
        with estimate.dry_run() as work:
            masking(lm, scores or chosen, ks, **arguments)  # type: ignore[arg-type]
        return run.show_estimate(lm, work)
    result = masking(lm, scores or chosen, ks, **arguments)  # type: ignore[arg-type]
    kept = {"heads": heads, "k": ks, "listed": LISTED, "scale": scale, "random": random, "draws": draws}
    run.save_config("mask", {**kept, **given, "seed": seed})
    show_evaluation(result, as_json)
