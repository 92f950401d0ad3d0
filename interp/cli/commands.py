"""What the commands do: settings from the command line, the library's own functions, results saved and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.interp.cli import console
from headscope.interp.cli.settings import keywords, passages, shared
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.runs.estimate import Work, dry_run, estimate
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.provenance import provenance


def run_discover(
    method: str,
    model: str,
    out: Path | None,
    given: dict[str, Any],
    top: int,
    as_json: bool,
    dry: bool,
    device: Any,
    dtype: Any,
) -> None:
    """Run a discovery method and show its highest-scoring heads."""
    from headscope.interp import heads

    function = heads.method(method)
    settings = keywords(function, method, given)
    lm = load_model(model, device=device, dtype=dtype)
    if dry:
        with dry_run() as work:
            function(lm, out=out, **settings)
        show_estimate(lm, work, as_json)
        return
    scores = function(lm, out=out, **settings)
    if out is not None:
        save_config(out, f"discover {method}", {"model": model, **settings})
    best = scores.to_frame().head(top).to_dict("records")
    made = scores.provenance
    title = (
        f"{scores.method}: top {len(best)} of {scores.mean.size} heads, {made['kept']} of {made['trials']} trials kept"
    )
    if as_json:
        console.show_json({"method": scores.method, "heads": scores.to_frame().to_dict("records"), "provenance": made})
    else:
        console.show_rows(best, title, False)


def run_probe(
    dataset: str,
    model: str,
    out: Path | None,
    setting: list[str],
    top: int,
    as_json: bool,
    dry: bool,
    device: Any,
    dtype: Any,
) -> None:
    """Probe every head and show the best, beside what chance and the words alone reach."""
    from headscope.probes import load_labelled, probe_heads

    settings = keywords(probe_heads, "probe", {"set": setting})
    lm = load_model(model, device=device, dtype=dtype)
    if dry:
        lengths = [len(ids) for ids in lm.tokenizer(list(load_labelled(dataset).texts))["input_ids"]]
        files = ["probe_*.json", "probe_*.parquet", "probe_*.safetensors", "control/"] if out else []
        show_estimate(lm, Work([(length, 0) for length in lengths], files), as_json)
        return
    result = probe_heads(lm, dataset, out=out, **settings)
    if out is not None:
        save_config(out, f"probe {dataset}", {"model": model, **settings})
    if as_json:
        console.show_json({"summary": result.summary(), "heads": result.to_frame().to_dict("records")})
    else:
        console.show_rows(result.to_frame().head(top).to_dict("records"), f"probe {dataset}: best heads", False)
        flat = {key: value for key, value in result.summary().items() if not isinstance(value, dict | list)}
        console.show_rows([{**flat, **result.summary()["baselines"]}], "beside chance and the words alone", False)


def run_evaluate(
    task: str,
    model: str,
    edit: dict[str, Any],
    given: dict[str, Any],
    controls: int,
    seed: int,
    out: Path | None,
    as_json: bool,
    dry: bool,
    device: Any,
    dtype: Any,
) -> None:
    """Evaluate tasks with and without an ablation, and show the comparison."""
    from headscope.interp.results.scores import HeadScores
    from headscope.interventions import AblateHeads, evaluate, head_means
    from headscope.interventions.tasks import TASKS

    names = [name.strip() for name in task.split(",")]
    for name in names:
        if name not in TASKS:
            raise HeadscopeError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    if edit["reference"] is not None and edit["how"] != "mean":
        raise HeadscopeError("--reference is the text of mean ablation; give --how mean with it")
    heads = None if edit["ablate"] is None else HeadScores.load(edit["ablate"]).top(edit["top"])
    tasks = [TASKS[name](**keywords(TASKS[name], name, shared(TASKS[name], given))) for name in names]
    lm = load_model(model, device=device, dtype=dtype)
    mean = heads is not None and edit["how"] == "mean"
    reference = passages(edit["reference"]) if mean else []
    arguments: dict[str, Any] = {"controls": controls, "seed": seed, "out": out}
    if dry:
        how: Any = "zero" if mean else edit["how"]  # as many passes, without the means
        planned = [] if heads is None else [AblateHeads(heads, how, during=edit["during"])]
        with dry_run() as work:
            evaluate(lm, tasks, planned, **arguments)
        work.passes += [(int(lm.encode(text)["input_ids"].shape[1]), 0) for text in reference]
        show_estimate(lm, work, as_json)
        return
    interventions = []
    if heads is not None:
        means = head_means(lm, reference) if reference else None
        interventions = [AblateHeads(heads, edit["how"], during=edit["during"], means=means)]
    result = evaluate(lm, tasks, interventions, **arguments)
    if out is not None:
        save_config(out, f"evaluate {task}", {"model": model, **edit, **given, "controls": controls, "seed": seed})
    if as_json:
        document = {"summary": result.summary(), "contrasts": result.contrasts()}
        console.show_json({key: frame.to_dict("records") for key, frame in document.items()})
    else:
        show_evaluation(result)


def show_evaluation(result: Any) -> None:
    """The conditions and, against their random heads, the interventions."""
    summary = result.summary()
    shown = summary[summary["kind"] != "control"].drop(columns=["of"])
    console.show_rows(shown.to_dict("records"), "evaluation, 95 % paired bootstrap intervals", False)
    contrasts = result.contrasts()
    if len(contrasts):
        console.show_rows(contrasts.to_dict("records"), "against layer-matched random heads", False)


def run_report(folder: Path, out: Path | None, prompt: str | None, model: str | None, as_json: bool) -> None:
    """Write the report of a results folder."""
    from headscope.interp.reports.results import Results

    results = Results.find(folder)
    path = results.report(prompt, model).save(out or folder / "report.html")
    if as_json:
        console.show_json({"report": str(path), "summary": results.summary()})
        return
    console.show_rows(results.summary(), f"results in {folder}", False)
    for result in results.evaluations.values():
        show_evaluation(result)
    console.note(f"report: {path}")


def save_config(out: Path, command: str, settings: dict[str, Any]) -> None:
    """Keep the configuration beside the results."""
    document = {"command": command, "settings": settings, **provenance()}
    name = f"{command.replace(' ', '-').replace('/', '-')}.config.json"
    write_atomically(out / name, json.dumps(document, indent=1, default=str).encode())


def show_estimate(lm: Any, work: Work, as_json: bool) -> None:
    """What a command would take, instead of running it."""
    found = estimate(lm, work)
    if as_json:
        console.show_json(found)
    else:
        console.show_rows([{**found, "files": ", ".join(found["files"]) or "none"}], "dry run: nothing was run", False)
