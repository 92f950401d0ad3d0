"""``headscope doctor``: what works on this machine, and what to do about what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.interp.cli.app import Json, app

if TYPE_CHECKING:
    from headscope.interp.machine.checkup import Checkup

_GB = 1e9


@app.command()
def doctor(
    warm: Annotated[
        bool, typer.Option("--warm", help="Also compile the kernels of every GPU and hold them to the definition.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, which kernels run here, what is in the cache, and what to mend.

    Exit code 1 where something is broken; what is merely slower or not installed is said, and is 0.
    """
    from headscope.interp.cli import console
    from headscope.interp.machine.checkup import checkup

    found = checkup(warm=warm)
    if as_json:
        console.show_json(found.document())
    else:
        _show(found)
    if found.broken:
        raise typer.Exit(1)


def _show(found: Checkup) -> None:
    from headscope.interp.cli import console

    machine = [{"what": name, "here": value} for name, value in found.machine.items()]
    cache = {"what": "models", "here": f"{found.cache['folder']} ({found.cache['free'] / _GB:.0f} GB free)"}
    console.show_rows([*machine, *_cards(found), cache], "this machine", False)
    packages = [console.as_row(one) for one in found.packages]
    if packages:
        console.show_rows(packages, "packages, and what headscope asks for", False)
    if found.engines:
        console.show_rows([console.as_row(one) for one in found.engines], "which kernels run", False)
    if found.warmed:
        rows = [{**console.as_row(one), "fault": one.fault or "none"} for one in found.warmed]
        console.show_rows(rows, "first calls, compilation included", False)
    models = [
        {"model": one["name"], "ready": one["cached"], "on disk": f"{one['size'] / _GB:.2f} GB"} for one in found.models
    ]
    console.show_rows(models, "models that need no hub", False)
    order = {"broken": 0, "warning": 1, "note": 2}
    findings = sorted(found.findings, key=lambda one: order[one.level])
    if findings:
        console.show_rows([console.as_row(one) for one in findings], "findings", False)
    verdict = "something is broken: see the findings" if found.broken else "nothing is broken"
    console.note(verdict)


def _cards(found: Checkup) -> list[dict[str, Any]]:
    if not found.cards:
        return [{"what": "GPU", "here": "none: the CPU computes, by the streaming engine"}]
    return [
        {
            "what": card["device"],
            "here": f"{card['name']}, compute capability {card['capability']}, {card['memory'] / _GB:.0f} GB",
        }
        for card in found.cards
    ]
