"""``headscope evaluate``: tasks with heads changed, beside no edit and random heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Depths, Device, DryRun, Dtype, Json, Lengths, Model, Out, Run, Seed, Settings, app

if TYPE_CHECKING:
    from headscope.interp.results.evaluation import Evaluation


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="Comma-separated tasks; `headscope list tasks` names them.")],
    model: Model,
    ablate: Annotated[Path | None, typer.Option("--ablate", help="Head scores (folder or JSON) to ablate.")] = None,
    top: Annotated[int, typer.Option("--top", help="How many of the highest-scoring heads.")] = 10,
    how: Annotated[str, typer.Option("--how", help="zero, mean or uniform.")] = "zero",
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="With --how mean: average over this text's paragraphs (default: bundled)."),
    ] = None,
    during: Annotated[str, typer.Option("--during", help="always, prefill or decode.")] = "always",
    controls: Annotated[int, typer.Option("--controls", help="Layer-matched random head sets.")] = 10,
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
    """Evaluate with heads ablated, beside no edit and layer-matched random heads."""
    from headscope.interp.cli.settings import keywords, passages, shared
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.results.scores import HeadScores
    from headscope.interp.runs import estimate
    from headscope.interventions import AblateHeads, head_means
    from headscope.interventions import evaluate as run_evaluate
    from headscope.interventions.tasks import TASKS

    run = Run(model, out, as_json, dry_run, device, dtype)
    given = {"lengths": lengths, "depths": depths, "set": setting or []}
    names = [name.strip() for name in task.split(",")]
    if reference is not None and how != "mean":
        raise HeadscopeError("--reference is the text of mean ablation; give --how mean with it")
    heads = None if ablate is None else HeadScores.load(ablate).top(top)
    tasks = [TASKS[name](**keywords(TASKS[name], name, shared(TASKS[name], given))) for name in names]
    lm = run.load()
    texts = passages(reference) if heads is not None and how == "mean" else []
    arguments: dict[str, Any] = {"controls": controls, "seed": seed, "out": out}
    if dry_run:
        cheap: Any = "zero" if texts else how  # as many passes, without the means
        planned = [] if heads is None else [AblateHeads(heads, cheap, during=during)]  # type: ignore[arg-type]
        with estimate.dry_run() as work:
            run_evaluate(lm, tasks, planned, **arguments)
        work.passes += [(int(lm.encode(text)["input_ids"].shape[1]), 0) for text in texts]
        return run.show_estimate(lm, work)
    interventions = []
    if heads is not None:
        means = head_means(lm, texts) if texts else None
        interventions = [AblateHeads(heads, how, during=during, means=means)]  # type: ignore[arg-type]
    result = run_evaluate(lm, tasks, interventions, **arguments)
    edit = {"ablate": ablate, "top": top, "how": how, "during": during, "reference": reference}
    run.save_config(f"evaluate {task}", {**edit, **given, "controls": controls, "seed": seed})
    show_evaluation(result, as_json)


def show_evaluation(result: Evaluation, as_json: bool) -> None:
    """The conditions and, against their random heads, the interventions."""
    from headscope.interp.cli import console

    summary, contrasts = result.summary(), result.contrasts()
    if as_json:
        console.show_json({"summary": summary.to_dict("records"), "contrasts": contrasts.to_dict("records")})
        return
    shown = summary[summary["kind"] != "control"].drop(columns=["of"])
    console.show_rows(shown.to_dict("records"), "evaluation, 95 % paired bootstrap intervals", False)
    if len(contrasts):
        console.show_rows(contrasts.to_dict("records"), "against layer-matched random heads", False)
