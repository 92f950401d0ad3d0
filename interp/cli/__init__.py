"""The command line: ``headscope models | trace | discover | probe | evaluate | report``.

The one door that may import every room, inside its commands, so that ``--help`` is instant. Results go to stdout
(``--json`` for scripts), everything else to stderr. Exit codes: 0 done, 2 bad input (one line says what to do),
130 interrupted (run the same command again to resume), 1 a bug.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="headscope",
    help="An oscilloscope for attention heads: trace a model, find its heads, change them, evaluate again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
models_app = typer.Typer(help="Models known by name, and whether a model can be traced.")
app.add_typer(models_app, name="models")

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, hub id, local folder or GGUF file.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results; a killed run resumes from it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print passes, time, memory and files; run nothing.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:0 ... (default: CUDA where present).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 ... (default: float32 on the CPU).")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Prompt lengths in tokens, e.g. 1000,2000.")]
Depths = Annotated[str | None, typer.Option("--depths", help="Needle depths: how many, or percents such as 0,50,100.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting as NAME=VALUE (JSON values); repeatable.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"headscope {version('headscope')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """An oscilloscope for attention heads: trace a model, find its heads, change them, evaluate again."""


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that need no hub, and whether they are in the cache."""
    if context.invoked_subcommand is not None:
        return
    from headscope.interp.cli import console
    from headscope.interp.models import available_models

    console.show_rows([console.as_row(entry) for entry in available_models()], "models", as_json)


@models_app.command("check")
def models_check(name: str, as_json: Json = False, device: Device = None, dtype: Dtype = None) -> None:
    """Prove on the spot that our attention is the model's own, layer by layer."""
    from headscope.interp.cli import console
    from headscope.interp.models import load_model
    from headscope.interp.sites import verify

    lm = load_model(name, device=device, dtype=dtype)
    found = verify(lm)
    row = {
        "model": lm.name,
        "architecture": lm.info.architecture,
        "verified": found.passed,
        "calls": found.calls,
        "largest_difference": found.largest_difference,
        "share_of_bound": found.worst,
        "problems": "; ".join(found.problems),
    }
    console.show_rows([row], "verification", as_json)
    if not found.passed:
        raise typer.Exit(2)


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
    """
    from headscope.interp.cli.trace import run_trace

    settings = {"statistics": statistics, "last": last, "layers": layers, "memory": memory}
    run_trace(model, prompt or [], file, out, settings, as_json, dry_run, device, dtype)


@app.command()
def discover(
    method: Annotated[str, typer.Argument(help="sinks, induction, previous_token, duplicate_token or retrieval.")],
    model: Model,
    out: Out = None,
    lengths: Lengths = None,
    depths: Depths = None,
    samples: Annotated[int | None, typer.Option("--samples", help="How many samples to draw.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Use this text file instead of the bundled one.")] = None,
    seed: Seed = 0,
    top: Annotated[int, typer.Option("--top", help="Heads to print.")] = 10,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score every head by a published method, with confidence intervals."""
    from headscope.interp.cli import commands

    given = {"lengths": lengths, "depths": depths, "samples": samples, "text": text, "seed": seed, "set": setting or []}
    commands.run_discover(method, model, out, given, top, as_json, dry_run, device, dtype)


@app.command()
def probe(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="truth, subject_number, or a CSV/JSONL file.")] = "truth",
    out: Out = None,
    top: Annotated[int, typer.Option("--top", help="Heads to print.")] = 10,
    setting: Settings = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fit a linear probe to every head's output, with a shuffled-label control."""
    from headscope.interp.cli import commands

    commands.run_probe(dataset, model, out, setting or [], top, as_json, dry_run, device, dtype)


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="Comma-separated tasks: needle, text_loss.")],
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
    from headscope.interp.cli import commands

    edit = {"ablate": ablate, "top": top, "how": how, "during": during, "reference": reference}
    given = {"lengths": lengths, "depths": depths, "set": setting or []}
    commands.run_evaluate(task, model, edit, given, controls, seed, out, as_json, dry_run, device, dtype)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of results; subfolders are read too.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file (default: FOLDER/report.html).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Also draw each method's top head on this prompt.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model for --prompt (default: the results').")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put results into one HTML page that opens offline, and print their summary."""
    from headscope.interp.cli import commands

    commands.run_report(folder, out, prompt, model, as_json)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; returns never (exits with a code scripts can use)."""
    import sys

    from headscope.interp.errors import HeadscopeError

    try:
        app(args=arguments)
    except HeadscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (| head)
        sys.stderr.close()
        sys.exit(0)
