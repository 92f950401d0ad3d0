"""A small map of layers x heads as SVG, for notebooks: no library, no script, readable on light and dark pages."""

from __future__ import annotations

import html

import numpy as np
from numpy.typing import NDArray

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
BLUE_RED = ((33, 102, 172), (247, 247, 247), (178, 24, 43))  # ColorBrewer RdBu, white at 0
MISSING = "#9aa5b1"
TEXT = 'font-family="system-ui, sans-serif" font-size="11"'


def svg_map(values: NDArray[np.float64], title: str, *, hover: bool = True, ink: str = "currentColor") -> str:
    """``values`` (layer, head) as coloured cells, layers across and heads down; NaN is grey. ``hover``: each says its
    value where one points at it (as a file of its own a picture cannot); ``ink`` colours the words.

    The colours run from 0 (or the lowest) to the highest value; with negative values they are centred at 0, blue below.
    """
    layers, heads = values.shape
    known = values[np.isfinite(values)]
    top = float(np.abs(known).max(initial=0.0)) or 1.0
    signed = bool((known < 0).any())
    stops, low = (BLUE_RED, -top) if signed else (VIRIDIS, 0.0)
    cell = min(16, max(4, 560 // max(layers, 1)))
    left, head = 34, 24
    width, height = left + cell * layers + 8, head + cell * heads + 34
    cells = [
        f'<rect x="{left + cell * layer}" y="{head + cell * row}" width="{cell - 1}" height="{cell - 1}" '
        f'fill="{_colour((value - low) / (top - low), stops)}"'
        + (f"><title>L{layer}H{row}: {value:.3g}</title></rect>" if hover else "/>")
        for (layer, row), value in np.ndenumerate(values)
    ]
    under = head + cell * heads
    text = f'{TEXT} fill="{ink}"'
    words = [
        f'<text x="0" y="12" {text}>{html.escape(title)}</text>',
        f'<text x="{left}" y="{under + 14}" {text}>layer 0 to {layers - 1}; colours {low:.3g} to {top:.3g}</text>',
        f'<text x="0" y="{head + 10}" {text}>head</text>',
    ]
    width = max(width, 420)
    style = "max-width:100%;height:auto"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" style="{style}" '
        f'role="img" aria-label="{html.escape(title, quote=True)}">{"".join(words + cells)}</svg>'
    )


def _colour(share: float, stops: tuple[tuple[int, int, int], ...]) -> str:
    if not np.isfinite(share):
        return MISSING
    place = float(np.clip(share, 0.0, 1.0)) * (len(stops) - 1)
    red, green, blue = (round(np.interp(place, range(len(stops)), channel)) for channel in zip(*stops, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
