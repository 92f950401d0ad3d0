"""``headscope probe``: what a linear probe reads off every head's output."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.interp.cli.app import Device, DryRun, Dtype, Json, Model, Out, Run, Settings, Top, app


@app.command()
def probe(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="truth, subject_number, or a CSV/JSONL file.")] = "truth",
    out: Out = None,
    top: Top = 10,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fit a linear probe to every head's output, with a shuffled-label control."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import keywords
    from headscope.interp.runs.estimate import Work
    from headscope.probes import load_labelled, probe_heads

    run = Run(model, out, as_json, dry_run, device, dtype)
    settings = keywords(probe_heads, "probe", setting or ())
    lm = run.load()
    if dry_run:
        lengths = [len(ids) for ids in lm.tokenizer(list(load_labelled(dataset).texts))["input_ids"]]
        files = ["probe_*.json", "probe_*.parquet", "probe_*.safetensors", "control/"] if out else []
        return run.show_estimate(lm, Work([(length, 0) for length in lengths], files))
    result = probe_heads(lm, dataset, out=out, **settings)
    run.save_config(f"probe {dataset}", settings)
    if as_json:
        console.show_json({"summary": result.summary(), "heads": result.to_frame().to_dict("records")})
    else:
        console.show_rows(result.to_frame().head(top).to_dict("records"), f"probe {dataset}: best heads", False)
        flat = {key: value for key, value in result.summary().items() if not isinstance(value, dict | list)}
        console.show_rows([{**flat, **result.summary()["baselines"]}], "beside chance and the words alone", False)
