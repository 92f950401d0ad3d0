"""``headscope exemplars``: a sweep over prompts, and those where a statistic of chosen heads is largest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headscope.interp.cli.app import Device, DryRun, Dtype, Json, Model, Run, Seed, app


@app.command()
def exemplars(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="Prompts: a line each, or .jsonl with 'text' or 'input_ids'.")],
    heads: Annotated[str, typer.Option("--heads", help="Heads such as L5H3,L8H0.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the sweep's record, exemplars.json and exemplars.html.")
    ],
    statistic: Annotated[str, typer.Option("--statistic", help="One with a value a query.")] = "entropy",
    per: Annotated[str, typer.Option("--per", help="A prompt's score: max or mean of its queries.")] = "max",
    top: Annotated[int, typer.Option("--top", help="Prompts with the largest score.")] = 10,
    each: Annotated[int, typer.Option("--each", help="Prompts of each decile.")] = 3,
    window: Annotated[int, typer.Option("--window", help="Tokens shown of a prompt.")] = 64,
    memory: Annotated[str, typer.Option("--memory", help="What a batch may take above the model, e.g. 2GiB.")] = "1GiB",
    seed: Seed = 0,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the prompts where a statistic of these heads is largest, and some of each decile, with their tokens marked.

    Their layers are swept into OUT/record, which a killed run continues.
    """
    from headscope.interp.cli import console
    from headscope.interp.cli.trace import named_statistics, read_prompts
    from headscope.interp.errors import HeadscopeError
    from headscope.interp.results.headset import HeadSet
    from headscope.interp.runs import estimate
    from headscope.interp.sweeps import sweep
    from headscope.interp.sweeps.exemplar_page import page
    from headscope.interp.sweeps.exemplars import exemplars as find

    chosen, declared = HeadSet.of(heads), named_statistics(statistic)
    if len(declared) > 1:
        raise HeadscopeError("exemplars are of one statistic: run the command once for each, with its own --out")
    prompts = read_prompts([], data)
    run = Run(model, out, as_json, dry_run, device, dtype)
    lm = run.load()
    chosen.check(lm.info.layers, lm.info.heads)
    swept: dict[str, Any] = {"out": out / "record", "memory": memory, "layers": sorted({layer for layer, _ in chosen})}
    if dry_run:
        with estimate.dry_run() as work:
            sweep(lm, prompts, declared, **swept)
        return run.show_estimate(lm, work)
    sweep(lm, prompts, declared, **swept)
    shown: dict[str, Any] = {"per": per, "top": top, "each": each, "window": window, "seed": seed}
    made = {"model": lm.name, "data": data.name, "statistic": str(declared[0]), **shown}
    spell = lm.required_tokenizer().convert_ids_to_tokens
    found = find(out / "record", declared[0].name, chosen, spell, **shown, provenance=made)
    found.save(out / "exemplars.json")
    path = page(found, lm.name).save(out / "exemplars.html")
    run.save_config("exemplars", {"data": data, "heads": heads, "statistic": statistic, **shown})
    rows = [
        {"head": f"L{one.layer}H{one.head}", "prompt": best.example, "score": best.score}
        for one in found.heads
        for best in one.top
    ]
    console.show_rows(rows, f"{statistic}: top prompts of {found.prompts}", as_json, key="top")
    console.note(f"page: {path}")
