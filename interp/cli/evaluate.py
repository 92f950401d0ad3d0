"""``headscope evaluate``: tasks with heads changed, beside no edit and random heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Depths, Device, DryRun, Dtype, Json, Lengths, Model, Out, Run, Seed, Settings, app
from headscope.interp.cli.intervene import HEADS, head_set

if TYPE_CHECKING:
    from headscope.interp.results.evaluation import Evaluation


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="Comma-separated tasks; `headscope list tasks` names them.")],
    model: Model,
    edit: Annotated[list[Path] | None, typer.Option("--with", help="A saved edit; repeatable.")] = None,
    sweep: Annotated[str | None, typer.Option("--sweep", help="Every edit at each: strength=0,0.5,1.")] = None,
    ablate: Annotated[str | None, typer.Option("--ablate", help=f"Heads to ablate: {HEADS}")] = None,
    top: Annotated[int, typer.Option("--top", help="Of head scores: how many of the highest.")] = 10,
    how: Annotated[str, typer.Option("--how", help="With --ablate: zero, mean, uniform or resample.")] = "zero",
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="With --how mean or resample: this text's paragraphs (default: bundled)."),
    ] = None,
    during: Annotated[str, typer.Option("--during", help="With --ablate: always, prefill, decode, answer.")] = "always",
    controls: Annotated[int, typer.Option("--controls", help="Layer-matched random head sets.")] = 10,
    vectors: Annotated[
        int | None, typer.Option("--vectors", help="Random vectors of an edit that adds some (default: --controls).")
    ] = None,
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
    """Evaluate with edits, beside no edit, layer-matched random heads and, where an edit adds vectors, random ones."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import asked, passages
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.runs import estimate
    from headscope.interventions import AblateHeads, load_intervention
    from headscope.interventions import evaluate as run_evaluate
    from headscope.interventions.evaluation.arguments import named_tasks, overlap, swept

    run = Run(model, out, as_json, dry_run, device, dtype)
    given = {"lengths": lengths, "depths": depths, "set": setting or []}
    measured = how in ("mean", "resample")
    if reference is not None and not measured:
        raise HeadscopeError("--reference is the text of mean ablation and resampling; give --how mean with it")
    tasks = named_tasks([name.strip() for name in task.split(",")], asked(given))
    heads, scores = (None, None) if ablate is None else head_set(ablate, top)
    values = _sweep(sweep)
    if values is not None and ablate is None and not edit:
        raise HeadscopeError("--sweep changes a setting of edits; give one by --with or --ablate")
    lm = run.load()
    for warning in () if scores is None else overlap(tasks, lm, scores):
        console.note(f"warning: {warning}")
    texts = passages(reference) if heads is not None and measured else []

    def edits(how: str, texts: Sequence[str]) -> list[Any]:
        found: list[Any] = [load_intervention(file, lm) for file in edit or ()]
        if heads is not None:
            own = AblateHeads.measured(lm, {"how": how}, texts)
            found.append(AblateHeads(heads, how, during=during, **own))  # type: ignore[arg-type]
        return found if values is None else swept(found, *values)

    drawn: dict[str, Any] = {"controls": controls, "vectors": vectors, "seed": seed, "out": out}
    if dry_run:
        with estimate.dry_run() as work:
            as_many = edits("zero" if texts else how, ())  # passes, without means
            run_evaluate(lm, tasks, as_many, **drawn)
        work.passes += [(int(lm.encode(text)["input_ids"].shape[1]), 0) for text in texts]
        return run.show_estimate(lm, work)
    result = run_evaluate(lm, tasks, edits(how, texts), **drawn)
    kept = {"with": edit, "sweep": sweep, "ablate": ablate, "top": top, "how": how, "during": during}
    run.save_config(
        f"evaluate {task}",
        {**kept, "reference": reference, **given, "controls": controls, "vectors": vectors, "seed": seed},
    )
    show_evaluation(result, as_json)


def _sweep(given: str | None) -> tuple[str, list[Any]] | None:
    """NAME=a,b,c: the setting and its values."""
    from headscope.interp.cli.settings import assignments
    from headscope.interp.errors import HeadscopeError

    if given is None:
        return None
    name, _, values = (part.strip() for part in given.partition("="))
    found = [assignments([f"{name or '?'}={value}"])[name or "?"] for value in values.split(",") if value.strip()]
    if not name or not found:
        raise HeadscopeError(f"--sweep takes NAME=a,b,c, e.g. strength=0,0.5,1; got {given!r}")
    return name, found


def show_evaluation(result: Evaluation, as_json: bool) -> None:
    """The conditions, the interventions against their random controls, and dose and response."""
    from headscope.interp.cli import console
    from headscope.interp.reports.evaluation import few, notes
    from headscope.interp.reports.readable import readable
    from headscope.interp.results.details import tables as detail_tables
    from headscope.interp.results.doses import doses

    summary, contrasts = result.summary(), result.contrasts()
    if as_json:
        tables = {"summary": summary.to_dict("records"), "contrasts": contrasts.to_dict("records")}
        console.show_json({**tables, "details": result.details})
        return
    shown = summary[summary["kind"] != "control"].drop(columns=["kind", "of", "groups", "higher_is_better"])
    title = "evaluation: 95 % bootstrap intervals, paired permutation p, Holm over the tasks of a condition"
    console.show_rows(readable(shown).to_dict("records"), title, False)
    if len(contrasts):
        least = float(contrasts["p_least"].max())
        table = contrasts.drop(columns=["rank", "p_least", "p_worse", "higher_is_better", "intervention", "p_holm"])
        title = f"against random controls (no tail can be below {least:.2g} with so many)"
        console.show_rows(readable(table).to_dict("records"), title, False)
    for task, table in detail_tables(result.details).items():
        console.show_rows(table.to_dict("records"), f"{task}, beside its mean", False)
    found = doses(result)
    if len(found):
        table = found.drop(columns=["condition", "p_permutation", "delta_low", "delta_high"])
        console.show_rows(readable(table).to_dict("records"), "dose and response", False)
    for line in [*few(summary), *notes(result)]:
        console.note(f"note: {line}")
