"""``headscope lab``: an experiment of the laboratory, or all of them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headscope.interp.cli.app import Device, Json, Settings, app

Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, e.g. 0,1,2: everything that is drawn, once each.")]


@app.command()
def lab(
    name: Annotated[str, typer.Argument(help="`headscope list experiments` names them; all: every one.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results; a killed run resumes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small and short: mechanics, no figures.")] = False,
    seeds: Seeds = "0,1,2",
    setting: Settings = None,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Train small models under a paper's claim, watch their heads, and say what held."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import assignments, numbers
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.laboratory import EXPERIMENTS, run_experiment
    from headscope.interp.registry import make
    from headscope.interp.reports.laboratory import lab_page

    given = assignments(setting or [])
    if name == "all" and given:
        raise HeadscopeError("--set is of one experiment: name it in place of all")
    chosen = [make(EXPERIMENTS[each], each, given) for each in (list(EXPERIMENTS) if name == "all" else [name])]
    command = shlex.join(["headscope", *sys.argv[1:]])
    shown = []
    for one in chosen:
        asked = replace(one.quick(), **given) if quick else one  # what was asked for is not made smaller
        folder = None if out is None else out / one.name
        drawn = numbers(seeds, int, "--seeds")
        found = run_experiment(asked, seeds=drawn, out=folder, device=device, command=command)
        shown.append(
            {
                "experiment": one.name,
                "claims": found.verdicts().to_dict("records"),
                "numbers": found.summary().to_dict("records"),
            }
        )
        if folder is not None:
            lab_page(found).save(folder / "page.html")
        if not as_json:
            console.show_rows(found.verdicts().to_dict("records"), f"{one.name}: what held", False)
            console.show_rows(found.summary().to_dict("records"), f"{one.name}: {len(drawn)} seeds", False)
    if as_json:
        console.show_json(shown if name == "all" else shown[0])
