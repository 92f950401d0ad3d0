"""``headscope circuit``: find the circuit of a task, and hold it to what it claims."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope.interp.cli.app import Device, Dtype, Json, Model, Out, Run, Settings, app


@app.command()
def circuit(
    model: Model,
    task: Annotated[str, typer.Argument(help="ioi or coloured_objects.")] = "ioi",
    out: Out = None,
    setting: Settings = None,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the heads that a task goes through, by attribution or path patching, beside random circuits."""
    from headscope.interp.cli import console
    from headscope.interp.cli.settings import keywords
    from headscope.probes.circuits.study import study_circuit

    run = Run(model, out, as_json, False, device, dtype)
    settings = {"task": task, **keywords(study_circuit, "circuit", setting or ())}
    found = study_circuit(run.load(), out=out, **settings)
    run.save_config(f"circuit {task}", settings)
    if as_json:
        return console.show_json(
            {
                "circuit": found.circuit.document(),
                "evaluation": found.evaluation,
                "curve": found.curve.to_dict("records"),
            }
        )
    typer.echo(repr(found.circuit))
    nodes = {row["node"]: row["minimality"] for row in found.evaluation["nodes"]}
    heads = zip(found.circuit.heads, found.circuit.heads.weights, strict=True)
    weights: dict[str, float | None] = {f"L{layer}H{head}": weight for (layer, head), weight in heads}
    weights.update((f"L{layer}MLP", None) for layer in found.circuit.mlps or ())
    rows = [{"node": node, "weight": weight, "minimality": nodes.get(node)} for node, weight in weights.items()]
    console.show_rows(rows, f"circuit {task}: nodes", False)
    console.show_rows(found.evaluation["summary"], "on pairs that it was not found on", False)
    console.show_rows([found.evaluation["random"]], "faithfulness of random circuits of this size and layers", False)
    console.show_rows(found.curve.to_dict("records"), "faithfulness over size", False)
