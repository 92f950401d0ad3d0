"""The application that the commands' files add themselves to, and the options that they share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from headscope.interp.models import LanguageModel
    from headscope.interp.runs.estimate import Work

app = typer.Typer(
    name="headscope",
    help="An oscilloscope for attention heads: trace a model, find its heads, change them, evaluate again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, hub id, local folder or GGUF file.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results; a killed run resumes from it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print passes, time, memory and files; run nothing.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:0 ... (default: CUDA where present).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 ... (default: float32 on the CPU).")]
Top = Annotated[int, typer.Option("--top", help="Heads to print.")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Prompt lengths in tokens, e.g. 1000,2000.")]
Depths = Annotated[str | None, typer.Option("--depths", help="Needle depths in percent, e.g. 0,50,100.")]
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


@dataclass(frozen=True)
class Run:
    """What most commands are told: the model, where and how it runs, and where results go."""

    model: str
    out: Path | None = None
    as_json: bool = False
    dry: bool = False
    device: str | None = None
    dtype: str | None = None

    def load(self) -> LanguageModel:
        """The model."""
        from headscope.interp.models import load_model

        return load_model(self.model, device=self.device, dtype=self.dtype)

    def show_estimate(self, lm: LanguageModel, work: Work) -> None:
        """What the command would take, instead of running it."""
        from headscope.interp.cli import console
        from headscope.interp.runs.estimate import estimate

        found = estimate(lm, work)
        if self.as_json:
            console.show_json(found)
        else:
            row = {**found, "files": ", ".join(found["files"]) or "none"}
            console.show_rows([row], "dry run: nothing was run", False)

    def save_config(self, command: str, settings: dict[str, Any]) -> None:
        """Keep the configuration beside the results, if they are kept."""
        from headscope.interp.runs.files import write_atomically
        from headscope.interp.runs.provenance import provenance

        if self.out is None:
            return
        document = {"command": command, "settings": {"model": self.model, **settings}, **provenance()}
        name = f"{command.replace(' ', '-').replace('/', '-')}.config.json"
        write_atomically(self.out / name, json.dumps(document, indent=1, default=str).encode())
