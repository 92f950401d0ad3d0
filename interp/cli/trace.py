"""What ``headscope trace`` does: a sweep over prompts from the command line or a file, and a summary of its record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from headscope.interp import statistics as catalogue
from headscope.interp.cli import commands, console
from headscope.interp.cli.settings import numbers, read_text
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.records.record import each_part
from headscope.interp.runs.estimate import dry_run
from headscope.interp.statistics.queries import Last
from headscope.interp.sweeps import sweep
from headscope.interp.sweeps.ranks import device as launched_device
from headscope.interp.sweeps.ranks import leave, ranks


def run_trace(
    model: str,
    given: list[str],
    file: Path | None,
    out: Path,
    settings: dict[str, Any],
    as_json: bool,
    dry: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    """Sweep over the prompts and show what was recorded; every process of a launch takes its share."""
    prompts = read_prompts(given, file)
    options = {
        "statistics": _statistics(settings["statistics"]),
        "layers": None if settings["layers"] is None else numbers(settings["layers"], int, "--layers"),
        "queries": None if settings["last"] is None else Last(settings["last"]),
        "memory": settings["memory"],
    }
    lm = load_model(model, device=device or launched_device(), dtype=dtype)
    if dry:
        with dry_run() as work:
            sweep(lm, prompts, out=out, **options)
        commands.show_estimate(lm, work, as_json)
        return
    try:
        sweep(lm, prompts, out=out, **options)
        with ranks() as us:
            first = us.rank == 0
    finally:
        leave()
    if first:
        commands.save_config(out, "trace", {"model": model, "file": file, "prompts": len(prompts), **settings})
        rows = summary(each_part(out))
        console.show_rows(rows, f"{len(prompts)} prompts, record in {out}", as_json, key="statistics")


def read_prompts(given: list[str], file: Path | None) -> list[Any]:
    """Prompts of the command line, then those of a file: lines of text, or of JSON where its name ends on .jsonl.

    Raises:
        HeadscopeError: no prompt, or a file or a line that cannot be read.
    """
    found: list[Any] = list(given)
    lines = [] if file is None else read_text(file).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line) if file is not None and file.suffix == ".jsonl" else line)
        except ValueError as error:
            raise HeadscopeError(f"line {number} of {file} is not JSON ({error})") from error
    if not found:
        raise HeadscopeError("give a file of prompts (.txt or .jsonl), or at least one --prompt")
    return found


def _statistics(names: str) -> list[Any]:
    known = {cls.name: cls for cls in _below(catalogue.Statistic) if _needs_nothing(cls)}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise HeadscopeError(f"unknown statistic {name!r}; choose from {', '.join(sorted(known))}")
    return [known[name]() for name in wanted]


def _below(cls: Any) -> list[Any]:
    found: list[Any] = []
    for child in cls.__subclasses__():
        found += [child, *_below(child)]
    return found


def _needs_nothing(cls: type) -> bool:
    try:
        cls()
    except (HeadscopeError, TypeError):
        return False
    return bool(getattr(cls, "name", "")) and cls.__name__ != "HeadOutput"


def summary(parts: Iterable[xr.Dataset]) -> list[dict[str, Any]]:
    """Mean and range of every statistic over all examples, layers, heads and positions, one part at a time."""
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
