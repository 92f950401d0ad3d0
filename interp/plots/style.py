"""What every figure shares: one template, the colours, axes of indices, and text made safe to show."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.declared import unit_of

INK = "#1f2933"
SOFT = "#52606d"
RULE = "#e4e7eb"
AXIS = "#9aa5b1"
MUTED = "#a3adb8"
ACCENT = "#1f6f8b"
CONTRAST = "#c8553d"

SEQUENTIAL = "Viridis"
DIVERGING = "RdBu_r"  # blue below 0, white at 0, red above

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_HOVER_FONT = {"family": _FONT, "color": INK, "size": 12}

_AXIS = {
    "automargin": True,
    "gridcolor": RULE,
    "linecolor": AXIS,
    "showline": True,
    "tickcolor": AXIS,
    "ticklen": 4,
    "ticks": "outside",
    "title": {"font": {"size": 13, "color": SOFT}, "standoff": 10},
    "zeroline": False,
}

TEMPLATE = go.layout.Template(
    layout={
        "colorway": [ACCENT, CONTRAST, "#6b8f3c", "#8a5a9e", "#d19a2a", SOFT],
        "font": {"family": _FONT, "size": 12, "color": INK},
        "hoverlabel": {"align": "left", "bgcolor": "white", "bordercolor": AXIS, "font": _HOVER_FONT},
        "legend": {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        "margin": {"l": 60, "r": 24, "t": 76, "b": 52},
        "modebar": {"remove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"]},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {
            "font": {"size": 17, "color": INK},
            "subtitle": {"font": {"size": 12, "color": SOFT}},
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "pad": {"t": 14},
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)

# of a menu: Plotly keeps the chosen line light on a dark page too, so all of it is
MENU = {"type": "dropdown", "showactive": True, "bgcolor": "#f4faff", "font": {"size": 11, "color": "#10151a"}}

_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·", "▁": "·", "Ġ": "·", "Ċ": "⏎"}
# Plotly draws a handful of HTML's entities: & < > by name, any other by number. A dollar sign may start TeX.
_QUOTES = str.maketrans({'"': "&#34;", "'": "&#39;", "$": "&#36;"})


def _escape(text: str) -> str:
    return html.escape(text, quote=False).translate(_QUOTES)


def show_token(text: str, limit: int = 24) -> str:
    """A token as it can be put into HTML and into any Plotly text: escaped, every character visible, not too long.

    A space is shown as ``·``, a newline as ``⏎``, a tab as ``⇥``, the empty token as ``∅``; other characters that do
    not print (controls, direction marks, lone surrogates) as their escape, such as ``\\x00``. The markers that
    tokenizers write for a space or newline in raw pieces (``Ġ``, ``▁``, ``Ċ``) are shown the same way. More than
    ``limit`` characters keep their beginning and end around ``…``.
    """
    ends = text if len(text) <= 4 * limit else text[: 2 * limit] + text[-2 * limit :]
    visible = "".join(_MARKS.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in ends)
    if len(visible) > limit:
        tail = limit // 3
        visible = visible[: limit - 1 - tail] + "…" + visible[len(visible) - tail :]
    return _escape(visible) or "∅"


def show_text(text: object, limit: int = 160) -> str:
    """Words (a title, a label, a condition's name) as they can be put into any Plotly text: escaped, on one line."""
    words = " ".join(str(text).split())
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    # Plotly would read %{name} in a hover template as one of its variables.
    return _escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)).replace("%{", "&#37;{")


def figure(title: str, subtitle: str = "", *, inner: int, width: int | None = None, **layout: Any) -> go.Figure:
    """An empty figure in headscope's template, ``inner`` pixels high between title and x axis.

    ``subtitle`` is already safe text. A ``width`` too large for a page is left to the page.
    """
    heading: dict[str, Any] = {"text": show_text(title)}
    top = TEMPLATE.layout.margin.t
    if subtitle:
        heading["subtitle"] = {"text": subtitle}
    else:
        top -= 20
    margin = {"t": top}
    width = None if width is None or width > 860 else max(560, width)
    height = inner + top + TEMPLATE.layout.margin.b
    fig = go.Figure()
    return fig.update_layout(template=TEMPLATE, title=heading, height=height, width=width, margin=margin, **layout)


def colour_range(values: NDArray[np.float64], *, diverging: bool = False, zero: bool = True) -> tuple[float, float]:
    """Ends of the colour scale: symmetric around 0 where diverging, else the values' own, with 0 if ``zero``."""
    if diverging:
        top = float(np.nanmax(np.abs(values))) or 1.0
        return -top, top
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    low = min(low, 0.0) if zero else low
    return low, high if high > low else low + 1.0


def drawn(values: NDArray[np.float64]) -> NDArray[Any]:
    """Values as a large figure holds them: from a thousand on float32 whose last 7 bits are 0, to 1 part in 10^5, which
    is finer than a hover says and takes a third of the page."""
    if values.size < 1000:
        return values
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    cut = np.where(np.isfinite(values), (bits + np.uint32(0x40)) & np.uint32(0xFFFFFF80), bits)
    return cut.astype(np.uint32).view(np.float32)


def colour_bar(label: str) -> dict[str, Any]:
    """A slim colour bar with its label along the side; ``label`` is already safe text."""
    font = {"size": 12, "color": SOFT}
    return {"title": {"text": label, "side": "right", "font": font}, "thickness": 12, "outlinewidth": 0, "xpad": 8}


def signed(values: NDArray[np.float64]) -> bool:
    """Whether there are values below 0: differences, contributions. Their colours are centred at 0."""
    return bool((values[np.isfinite(values)] < 0).any())


def with_unit(name: str) -> str:
    """A statistic's name in words, with its unit where it has one."""
    words, unit = name.replace("_", " "), unit_of(name)
    return f"{words} ({'share of attention' if unit == 'mass' else unit})" if unit else words


def thin(count: int, most: int) -> int:
    """The step, from 1, 2, 5, 10 ..., at which ``count`` labels become at most ``most``."""
    need = max(1, math.ceil(count / most))
    scale = 10 ** math.floor(math.log10(need))
    return int(next(step * scale for step in (1, 2, 5, 10) if step * scale >= need))


def ticks(values: Sequence[Any], most: int) -> dict[str, Any]:
    """Axis settings for cells 0, 1, ... that stand for ``values``: a label at every n-th cell, no grid."""
    at = list(range(0, len(values), thin(len(values), most)))
    return {"showgrid": False, "tickmode": "array", "tickvals": at, "ticktext": [f"{values[i]}" for i in at]}


def cells(values: Sequence[Any], most: int, *, downwards: bool = False) -> dict[str, Any]:
    """``ticks``, and a range that ends with the first and last cell; ``downwards`` puts cell 0 on top."""
    ends = [-0.5, len(values) - 0.5]
    return {**ticks(values, most), "range": ends[::-1] if downwards else ends}


def cross_out(fig: go.Figure, missing: NDArray[np.bool_], names: NDArray[np.object_], reason: str) -> None:
    """Mark the heatmap cells (y, x) that have no data with a cross, which no colour of a scale can be taken for."""
    y, x = np.nonzero(missing)
    marker = {"symbol": "x-thin", "size": 8, "line": {"color": MUTED, "width": 1.5}}
    template = "%{text}<extra></extra>"
    text = [f"{name}: {reason}" for name in names[missing]]
    fig.add_scatter(x=x, y=y, mode="markers", marker=marker, text=text, hovertemplate=template, showlegend=False)


def interval_text(low: float, high: float) -> str:
    """``[0.123, 0.456]``, or an empty string where there is no interval."""
    return f"[{low:.3g}, {high:.3g}]" if np.isfinite(low) and np.isfinite(high) else ""


def segments(low: Iterable[float], high: Iterable[float], at: Iterable[float]) -> tuple[list[Any], list[Any]]:
    """Horizontal segments from ``low`` to ``high`` at heights ``at``, as the x and y of one line trace with gaps."""
    xs: list[Any] = []
    ys: list[Any] = []
    for left, right, y in zip(low, high, at, strict=True):
        if np.isfinite(left) and np.isfinite(right):
            xs += [float(left), float(right), None]
            ys += [float(y), float(y), None]
    return xs, ys


def require(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise HeadscopeError unless ``frame`` has rows and every one of ``columns``."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise HeadscopeError(f"{what} needs the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    if frame.empty:
        raise HeadscopeError(f"{what} has no rows, so there is nothing to draw")
