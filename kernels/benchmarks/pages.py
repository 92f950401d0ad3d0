"""Pages of measurements: JSON files named after the device, and the tables of README.md, written from them.

    python kernels/benchmarks/pages.py    # README.md's tables and the pictures, anew from results/

A result is a JSON object whose ``kind`` says which table it makes; raw seconds and bytes are kept, and what is derived
from them (medians, ratios, differences) is derived here.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from headscope.kernels.benchmarks.picture import draw

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: written by pages.py -->", "<!-- end of tables -->"
GIB = 2**30
Result = dict[str, Any]


def machine() -> dict[str, str]:
    """What numbers are measured on."""
    found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
    return found


def save(result: Result, out: Path, name: str) -> Path:
    """Write ``result`` as JSON and as a page of Markdown, named after the device and ``name``; the JSON's path."""
    out.mkdir(parents=True, exist_ok=True)
    device = result["machine"]["device"].lower().replace(" ", "-")
    path = out / f"{device}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(result))
    return path


def page(result: Result) -> str:
    """One result as Markdown: what was measured, on what, by which command, and the table."""
    title, table = KINDS[result["kind"]]
    others = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if name != "device")
    head = [f"### {title(result)}", "", f"{result['machine']['device']}; {others}.", ""]
    return "\n".join([*head, f"    {result['command']}", "", *table(result), ""])


def _long_context_title(result: Result) -> str:
    chunks = f"in chunks of {result['chunk']:,}" if result["chunk"] < result["tokens"] else "in one piece"
    return f"A {result['shape']}-shaped Llama, {result['tokens']:,} tokens {chunks}"


def _long_context(result: Result) -> list[str]:
    base = next((case for case in result["cases"] if case["case"] == "untraced" and case.get("seconds")), None)
    lines = ["| | seconds | of untraced | peak GiB | more than untraced | record, GiB | checks |", "|---" * 7 + "|"]
    for case in result["cases"]:
        if not case.get("seconds"):
            lines.append(f"| {case['case']} | {case.get('error', 'not run')} | | | | | |")
            continue
        seconds, peak = statistics.median(case["seconds"]), case["peak bytes"]
        ratio = f"{seconds / statistics.median(base['seconds']):.2f}x" if base else ""
        more = f"{(peak - base['peak bytes']) / GIB:+.2f}" if base and peak and base["peak bytes"] else ""
        record = f"{case['record bytes'] / GIB:.2f}" if case.get("record bytes") else ""
        checks = "" if "checks" not in case else "pass" if all(c["passed"] for c in case["checks"]) else "FAIL"
        held = f"{peak / GIB:.2f}" if peak else ""
        lines.append(f"| {case['case']} | {seconds:.2f} | {ratio} | {held} | {more} | {record} | {checks} |")
    return lines


def _lengths_title(result: Result) -> str:
    return f"Time and memory against length, d_head {result['d']}"


def _lengths(result: Result) -> list[str]:
    lengths = sorted({row["tokens"] for row in result["rows"]})
    names = list(dict.fromkeys(row["what"] for row in result["rows"]))
    held = {(row["what"], row["tokens"]): row for row in result["rows"]}
    lines = ["| ms (MiB beyond the inputs) | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name in names:
        cells = []
        for n in lengths:
            row = held.get((name, n), {})
            extra = f" ({row['extra bytes'] / 2**20:,.0f})" if row.get("extra bytes") is not None else ""
            cells.append(f"{row['ms']:,.2f}{extra}" if "ms" in row else row.get("error", ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _corners_title(result: Result) -> str:
    return "Some of them, alone" if "--rows" in result["command"] else "Corners in which a kernel could be slow"


def _corners(result: Result) -> list[str]:
    """Without the trials of other tiles."""
    lines = ["| | | was | target | measured | ms | more MiB |", "|---" * 7 + "|"]
    for row in result["rows"]:
        if row.get("setting") is not None:
            continue
        if "what" not in row:
            lines.append(f"| {row['row']} | {row.get('failed', 'no time')} | | | | | |")
        elif "us" in row:
            lines.append(f"| {row['row']} | {row['what']} | {row['now']} | {row['target']} | {row['us']:.0f} us | | |")
        else:
            ms, more = f"{row['ms']:.3f}", f"{row.get('extra MiB', 0):,.0f}"
            was = "" if row["now"] is None else f"{row['now']}x"
            cells = row["row"], row["what"], was, f"{row['target']}x", f"{row['measured']:.2f}x", ms, more
            lines.append("| " + " | ".join(cells) + " |")
    return lines


KINDS: dict[str, tuple[Callable[[Result], str], Callable[[Result], list[str]]]] = {
    "long context": (_long_context_title, _long_context),
    "lengths": (_lengths_title, _lengths),
    "corners": (_corners_title, _corners),
}


def tables(folder: Path) -> str:
    """Every result in ``folder`` as Markdown, with the picture of those that have one drawn beside its JSON."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("kind") not in KINDS:
            continue
        parts.append(page(result))
        if result["kind"] == "lengths":
            picture = path.with_suffix(".svg")
            picture.write_text(draw(result))
            parts.append(f"![Time and memory against length]({folder.name}/{picture.name})\n")
    return "\n".join(parts)


def rewrite(readme: Path, folder: Path) -> None:
    """Replace what stands between the marks of ``readme`` by the tables of ``folder``."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    made = tables(folder) or "No result is committed yet.\n"
    readme.write_text(f"{before}{BEGIN}\n{made}{END}{after}")


if __name__ == "__main__":
    rewrite(HERE / "README.md", HERE / "results")
