"""The picture of time and memory against length: an SVG written by hand, from the numbers of ``lengths.py``.

Two panels on logarithmic axes with the name of every line at its end. Ink and grid are greys that both of GitHub's
backgrounds carry; nothing is drawn behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

COLOURS = ("#8c8c8c", "#d1495b", "#3a86c8", "#1f9e89", "#9b5de5", "#e08e2b", "#b5838d", "#6a994e")
INK, GRID = "#7d8590", "#7d859040"
WIDTH, HEIGHT, TOP, BOTTOM = 560, 380, 46, 44
LEFT, NAMES = 56, 158  # room for the values' labels, and for the lines' names
GAP = 13  # between two names
Points = dict[str, list[tuple[float, float]]]


def draw(result: dict[str, Any]) -> str:
    """The SVG of one result of ``lengths.py``: milliseconds, and MiB beyond the inputs, against tokens."""
    names = list(dict.fromkeys(row["what"] for row in result["rows"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    title = f"{result['machine']['device']}: bfloat16, causal, {result['heads']} heads, d_head {result['d']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
        _panel(_points(result, "ms", 1.0), colours, 0, "time", _milliseconds),
        _panel(_points(result, "extra bytes", 2.0**-20), colours, WIDTH, "memory beyond the inputs", _mebibytes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _points(result: dict[str, Any], field: str, unit: float) -> Points:
    """The lines of one panel: positive values only, which a logarithm has."""
    found: Points = {}
    for row in result["rows"]:
        if row.get(field):
            found.setdefault(row["what"], []).append((row["tokens"], row[field] * unit))
    return {name: sorted(line) for name, line in found.items()}


def _panel(lines: Points, colours: dict[str, str], shift: int, title: str, label: Callable[[float], str]) -> str:
    if not lines:
        return ""
    tokens = sorted({x for line in lines.values() for x, _ in line})
    values = [y for line in lines.values() for _, y in line]
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9) + 1)
    across = _scale(tokens[0], tokens[-1], shift + LEFT, shift + WIDTH - NAMES)
    up = _scale(10.0 ** decades[0], 10.0 ** decades[-1], HEIGHT - BOTTOM, TOP)
    x0, x1 = shift + LEFT, shift + WIDTH - NAMES
    parts = [f'<text x="{x0}" y="{TOP - 10}">{escape(title)}</text>']
    for power in decades:
        y = up(10.0**power)
        parts.append(f'<path d="M{x0} {y:.1f}H{x1}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{label(10.0**power)}</text>')
    for n in tokens:
        parts.append(
            f'<text x="{across(n):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_count(int(n))}</text>'
        )
    parts.append(f'<text x="{(x0 + x1) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    for name, line in lines.items():
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{colours[name]}"/>' for x, y in line]
    ends = {name: (across(line[-1][0]), up(line[-1][1])) for name, line in lines.items()}
    for name, y in _spread({name: y for name, (_, y) in ends.items()}).items():
        x, at = ends[name]
        parts.append(f'<path d="M{x + 4:.1f} {at:.1f}L{x1 + 8} {y:.1f}" stroke="{colours[name]}" stroke-width="0.7"/>')
        parts.append(f'<text x="{x1 + 11}" y="{y + 4:.1f}" fill="{colours[name]}">{escape(name)}</text>')
    return "\n".join(parts)


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Logarithmic, from ``low``..``high`` to pixels ``first``..``last``."""
    span = math.log(high / low) or 1.0
    return lambda value: first + (last - first) * math.log(value / low) / span


def _spread(at: dict[str, float]) -> dict[str, float]:
    """Heights of the names: in order, at least ``GAP`` apart, and inside the panel."""
    placed: dict[str, float] = {}
    floor = -math.inf
    for name, y in sorted(at.items(), key=lambda one: one[1]):
        placed[name] = floor = max(y, floor + GAP)
    over = max(0.0, floor - (HEIGHT - BOTTOM))
    ceiling = math.inf
    for name in reversed(placed):
        placed[name] = ceiling = min(placed[name], ceiling - GAP) if over else placed[name]
        if over and ceiling > HEIGHT - BOTTOM:
            placed[name] = ceiling = HEIGHT - BOTTOM
    return placed


def _count(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _milliseconds(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _mebibytes(value: float) -> str:
    return f"{value:g} MiB" if value < 10000 else f"{value:,.0f} MiB"
