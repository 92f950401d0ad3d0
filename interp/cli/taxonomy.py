"""``headscope taxonomy``: what kinds of heads a model has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Device, DryRun, Dtype, Json, Model, Out, Run, Seed, Settings, app

if TYPE_CHECKING:
    from headscope.interp.analysis.taxonomy import Taxonomy


@app.command()
def taxonomy(
    model: Model,
    out: Out = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Read windows of this file, not the bundled prose.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="Head scores to hold beside the clusters; repeatable.")
    ] = None,
    clusters: Annotated[int | None, typer.Option("--clusters", help="How many (default: by silhouette).")] = None,
    seed: Seed = 0,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Cluster the heads by what they do with texts, name the clusters, and say how stable they are over texts."""
    from headscope.interp.analysis.detectors import detected
    from headscope.interp.analysis.taxonomy import ARRAY, TABLE
    from headscope.interp.analysis.taxonomy import taxonomy as sort
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import keywords, read_text
    from headscope.interp.results.scores import HeadScores
    from headscope.interp.runs.estimate import Work

    run = Run(model, out, as_json, dry_run, device, dtype)
    given = keywords(sort, "taxonomy", setting or ()) | {"clusters": clusters, "seed": seed}
    if text is not None:
        given["texts"] = read_text(text)
    held = [HeadScores.load(path) for path in scores or ()]
    lm = run.load()
    if dry_run:
        length, samples = int(given.get("length", 128)), int(given.get("samples", 16))
        files = ["taxonomy.json", TABLE, ARRAY] if out else []
        return run.show_estimate(lm, Work([(length, 0)] * samples, files))
    found = sort(lm, **given, out=out)
    run.save_config("taxonomy", {**given, "texts": None if text is None else str(text)})
    beside = [] if not held else detected(found, held).to_dict("records")
    kinds = found.summary().to_dict("records")
    if as_json:
        return console.show_json(
            {"clusters": kinds, "heads": found.to_frame().to_dict("records"), **_told(found, beside)}
        )
    shown = ("cluster", "name", "heads", "medoid", "layers")
    console.show_rows([{key: row[key] for key in shown} for row in kinds], "kinds of heads", False)
    console.show_rows(_stability(found), "1: the same clusters or clusters apart; 0: none", False)
    if beside:
        console.show_rows(beside, "beside head methods", False)


def _told(found: Taxonomy, beside: list[Any]) -> dict[str, Any]:
    return {"stability": _stability(found), "silhouettes": found.silhouettes, "methods": beside}


def _stability(found: Taxonomy) -> list[dict[str, Any]]:
    """Silhouette and agreement over texts, each beside its null."""
    rows: list[dict[str, Any]] = [
        {"what": "silhouette", "value": found.silhouette, "low": None, "high": None},
        _row("silhouette where features are shuffled over heads", found.shuffled),
    ]
    if found.stability is not None:
        rows.append(_row("adjusted Rand index, texts resampled", found.stability.resampled))
        rows.append(_row("adjusted Rand index, two halves of the texts", found.stability.halves))
        rows.append(_row("adjusted Rand index, labels permuted", found.stability.null))
    return rows


def _row(what: str, values: tuple[float, float, float]) -> dict[str, Any]:
    return {"what": what, "value": values[0], "low": values[1], "high": values[2]}
