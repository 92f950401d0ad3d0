"""``headscope trace``: a sweep over prompts from the command line or a file, and a summary of its record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Device, DryRun, Dtype, Json, Model, Run, app

if TYPE_CHECKING:
    import xarray as xr


@app.command()
def trace(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the record (zarr); a killed run resumes from it.")
    ],
    file: Annotated[
        Path | None, typer.Argument(help="Prompts: a line each, or .jsonl with 'text' or 'input_ids'.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")] = None,
    statistics: Annotated[
        str, typer.Option("--statistics", "-s", help="Comma-separated, e.g. entropy,sink_mass,key_mass.")
    ] = "entropy,sink_mass,distance,key_mass",
    last: Annotated[int | None, typer.Option("--last", help="Only the last N queries of each prompt.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Only these layers, e.g. 0,5,11.")] = None,
    memory: Annotated[str, typer.Option("--memory", help="What a batch may take above the model, e.g. 2GiB.")] = "1GiB",
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Record statistics of every head on your prompts, in batches that fit the memory.

    On several GPUs: accelerate launch --multi_gpu -m headscope.interp.cli trace ... (or torchrun), with one --out.
    Every process takes its share.
    """
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import numbers
    from headscope.interp.records.record import each_part
    from headscope.interp.runs import estimate
    from headscope.interp.statistics.queries import Last
    from headscope.interp.sweeps import ranks as launch
    from headscope.interp.sweeps import sweep

    prompts = read_prompts(prompt or [], file)
    options: dict[str, Any] = {
        "statistics": named_statistics(statistics),
        "layers": None if layers is None else numbers(layers, int, "--layers"),
        "queries": None if last is None else Last(last),
        "memory": memory,
    }
    run = Run(model, out, as_json, dry_run, device or launch.device(), dtype)
    lm = run.load()
    if dry_run:
        with estimate.dry_run() as work:
            sweep(lm, prompts, out=out, **options)
        return run.show_estimate(lm, work)
    try:
        sweep(lm, prompts, out=out, **options)
        with launch.ranks(lm.inner) as us:
            first = us.first
    finally:
        launch.leave()
    if first:
        settings = {"statistics": statistics, "last": last, "layers": layers, "memory": memory}
        run.save_config("trace", {"file": file, "prompts": len(prompts), **settings})
        console.show_rows(
            summary(each_part(out)), f"{len(prompts)} prompts, record in {out}", as_json, key="statistics"
        )


def read_prompts(given: list[str], file: Path | None) -> list[Any]:
    """Prompts of the command line, then those of a file: lines of text, or of JSON where its name ends on .jsonl.

    Raises:
        HeadscopeError: no prompt, or a file or a line that cannot be read.
    """
    from headscope.interp.cli.settings import read_text
    from headscope.interp.errors import HeadscopeError

    found: list[Any] = list(given)
    lines = [] if file is None else read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line) if file is not None and file.suffix == ".jsonl" else line)
        except ValueError as error:
            raise HeadscopeError(f"line {number} of {file} is not JSON ({error})") from error
    if not found and file is not None:
        raise HeadscopeError(f"{file} holds no prompts: give a line of text (.jsonl: of JSON) for each")
    if not found:
        raise HeadscopeError("give a file of prompts (.txt or .jsonl), or at least one --prompt")
    return found


def named_statistics(names: str) -> list[Any]:
    """Statistics with their default settings, by name."""
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.statistics.declared import declared

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise HeadscopeError("--statistics names none; `headscope list statistics` shows them")
    return list(declared(wanted))


def summary(parts: Iterable[xr.Dataset]) -> list[dict[str, Any]]:
    """Mean and range of every statistic over all examples, layers, heads and positions, one part at a time."""
    import numpy as np

    seen: dict[str, list[Any]] = {}
    for part in parts:
        for name, variable in part.data_vars.items():
            values = variable.to_numpy()
            values = values[np.isfinite(values)] if values.dtype.kind == "f" else values[:0]
            if values.size:
                seen.setdefault(str(name), []).append(
                    (values.sum(dtype=np.float64), values.size, values.min(), values.max())
                )
    rows = []
    for name, found in sorted(seen.items()):
        total, count, low, high = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
        mean = float(total.sum() / count.sum())
        rows.append({"statistic": name, "mean": mean, "low": float(low.min()), "high": float(high.max())})
    return rows
