"""Values of image tokens over the picture that they come from."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.results.picture_values import PictureValues

CELLS = 400_000  # numbers in one figure
SIDE = 512  # pixels to which larger pictures are reduced
PANEL = 300  # pixels of the page a picture


def on_picture(
    maps: PictureValues | Sequence[PictureValues],
    *,
    title: str = "",
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    opacity: float = 0.6,
    common: bool = False,
) -> go.Figure:
    """Values over their picture, with a slider over the one dimension that they have beside the grid (layer, step or
    head). Several stand side by side: two pictures, two views of one, or before and after an edit.

    Every cell is drawn where its token comes from, in the picture's pixels: a crop leaves the rest bare, padding
    reaches beyond the picture. Marked cells (``PictureValues.mark``: sinks) have an open square, boxes an outline and a
    name. Of a picture read in several grids (tiles) each ``PictureValues`` is one, and says which under its name.

    Args:
        maps: values (row, column) or (one dimension, row, column), alike in that dimension.
        names: of the panels, by default what the values are and the chat's name.
        labels: of the slider's positions, such as the tokens that its steps choose; by default their numbers.
        opacity: of the values over the picture.
        common: one colour scale for all positions of the slider; False: each its own, which shows faint layers.

    Raises:
        HeadscopeError: nothing to draw; more than one further dimension, or different ones; too many numbers.
    """
    panels = [maps] if isinstance(maps, PictureValues) else list(maps)
    dim, at = _slider(panels)
    if labels is not None and len(labels) != len(at):
        raise HeadscopeError(f"{len(labels)} labels for a slider of {len(at)} positions: give one each")
    z = [one.values.to_numpy().astype(np.float64).reshape(len(at), *one.grid.shape) for one in panels]
    words = names or [f"{one.title} {one.name}".strip() for one in panels]
    under = [f"{one.grid.shape[0]} x {one.grid.shape[1]} tokens, {one.grid.view} picture" for one in panels]
    under = [text.replace("tiles picture", "tiles of the picture") for text in under]
    heads = [f"{style.show_text(a, 60)}<br><sub>{b}</sub>" for a, b in zip(words, under, strict=True)]
    fig = make_subplots(1, len(panels), subplot_titles=heads, horizontal_spacing=0.06)
    ends = _ends(z, common)
    traces: list[Any] = []
    for step, label in enumerate(at):
        for column, one in enumerate(panels):
            marked = _marked(one, label if dim == "layer" else None)
            look = _Look(one.unit if column == 0 else None, step == 0, opacity, *ends[step])
            traces += _traces(one.grid, z[column][step], marked, look)
    columns = [1 + i // 2 % len(panels) for i in range(len(traces))]
    fig.add_traces(traces, rows=[1] * len(traces), cols=columns)
    for column, one in enumerate(panels):
        _ground(fig, one, column)
    blank = style.figure(title or panels[0].title, inner=PANEL, width=120 + PANEL * len(panels)).layout
    above, below = 44, 70 if len(at) > 1 else 0  # the panels' names, and the slider
    margin = {"t": blank.margin.t + above, "b": style.TEMPLATE.layout.margin.b + below}
    fig.update_layout(blank).update_layout(height=blank.height + above + below, margin=margin, showlegend=False)
    if len(at) > 1:
        shown = at if labels is None else [f"{i} {style.show_token(text)}" for i, text in zip(at, labels, strict=True)]
        _add_slider(fig, dim, shown)
    return fig


def _slider(panels: Sequence[PictureValues]) -> tuple[str, list[Any]]:
    """The dimension beside the grid and its labels; "" and one label without any."""
    if not panels:
        raise HeadscopeError("there are no values to draw on a picture")
    found = set()
    for one in panels:
        dims = [str(dim) for dim in one.values.dims[:-2]]
        if len(dims) > 1:
            raise HeadscopeError(
                f"values of {', '.join(dims)} are too many for one picture: take .mean('head') or .sel(head=3) until "
                "one dimension is left for the slider"
            )
        found.add((dims[0], tuple(one.values[dims[0]].to_numpy().tolist())) if dims else ("", ("",)))
    if len(found) > 1:
        raise HeadscopeError("values that stand side by side need the same layers (or steps, or heads): select them")
    if sum(one.values.size for one in panels) > CELLS:
        raise HeadscopeError(f"more than {CELLS:,} numbers on a picture: select fewer layers or steps")
    if all(np.isnan(one.values.to_numpy()).all() for one in panels):
        raise HeadscopeError("the values are NaN everywhere, so there is nothing to draw")
    dim, labels = found.pop()
    return dim, list(labels)


def _ends(z: Sequence[NDArray[np.float64]], common: bool) -> list[tuple[float, float]]:
    """Ends of the colours of every position of the slider, the same in all panels."""
    steps = [np.concatenate([one[i].ravel() for one in z]) for i in range(len(z[0]))]
    whole = np.concatenate(steps)
    signed = style.signed(whole)

    def ends(values: NDArray[np.float64]) -> tuple[float, float]:
        known = values[np.isfinite(values)]
        return style.colour_range(known, diverging=signed) if known.size else (0.0, 1.0)

    return [ends(whole if common else values) for values in steps]


def _marked(one: PictureValues, layer: Any) -> NDArray[np.bool_]:
    """The marked cells of a layer, or of any (row, column)."""
    if one.marked is None:
        return np.zeros(one.grid.shape, dtype=bool)
    held = one.marked.any("layer") if layer is None else one.marked.sel(layer=layer)
    return np.asarray(held.to_numpy())


class _Look(NamedTuple):
    """How a panel's cells look: ``unit`` names the colours (None: no bar), which end at ``low`` and ``high``."""

    unit: str | None
    visible: bool
    opacity: float
    low: float
    high: float


def _traces(grid: ImageGrid, values: NDArray[np.float64], marked: NDArray[np.bool_], look: _Look) -> list[Any]:
    """One panel at one position of the slider: cells, and marks on them. Pixels are counted upwards here."""
    across, down = grid.edges
    up = grid.size[1] - down
    rows, columns = grid.shape
    tokens = grid.positions
    text = [[f"row {r}, column {c}<br>token {tokens[r, c]}" for c in range(columns)] for r in range(rows)]
    cells = go.Heatmap(
        z=values[::-1],
        x=across,
        y=up[::-1],
        text=text[::-1],
        opacity=look.opacity,
        zmin=look.low,
        zmax=look.high,
        colorscale=style.DIVERGING if look.low < 0 else style.SEQUENTIAL,
        colorbar=style.colour_bar(style.show_text(look.unit or "")),
        showscale=look.unit is not None,
        hoverongaps=False,
        hovertemplate="<b>%{z:.4g}</b><br>%{text}<extra></extra>",
        visible=look.visible,
    )
    r, c = np.nonzero(marked)
    square = {"symbol": "square-open", "size": 11, "color": style.CONTRAST, "line": {"width": 2}}
    marks = go.Scatter(
        x=(across[:-1] + across[1:])[c] / 2,
        y=(up[:-1] + up[1:])[r] / 2,
        mode="markers",
        marker=square,
        text=[f"marked: token {tokens[i, j]}" for i, j in zip(r, c, strict=True)],
        hoverinfo="text",
        visible=look.visible,
    )
    return [cells, marks]


def _ground(fig: go.Figure, one: PictureValues, column: int) -> None:
    """The picture, its objects' boxes, and the axes of a panel."""
    width, height = one.grid.size
    axis = "" if column == 0 else str(column + 1)
    fig.add_layout_image(
        source=_source(one.picture), xref=f"x{axis}", yref=f"y{axis}", x=0, y=height, sizex=width, sizey=height,
        xanchor="left", yanchor="top", sizing="stretch", layer="below",
    )  # fmt: skip
    for name, (left, top, right, bottom) in one.boxes.items():
        fig.add_shape(
            type="rect", x0=left, x1=right, y0=height - top, y1=height - bottom, row=1, col=column + 1,
            line={"color": "white", "width": 2}, label={"text": style.show_text(name, 24), "font": {"color": "white"}},
        )  # fmt: skip
    x0, y0, x1, y1 = one.grid.box
    plain = {"showgrid": False, "showticklabels": False, "ticks": "", "showline": False, "row": 1, "col": column + 1}
    fig.update_xaxes(range=[min(0, x0), max(width, x1)], constrain="domain", **plain)
    fig.update_yaxes(
        range=[height - max(height, y1), height - min(0, y0)], scaleanchor=f"x{axis}", constrain="domain", **plain
    )


def _source(picture: NDArray[np.uint8]) -> str:
    """The picture as a data address: PNG, or JPEG of a reduced one where it is large."""
    from PIL import Image

    image = Image.fromarray(picture)
    large = max(image.size) > SIDE
    if large:
        image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "JPEG" if large else "PNG", **({"quality": 88} if large else {}))
    return f"data:image/{'jpeg' if large else 'png'};base64,{base64.b64encode(held.getvalue()).decode()}"


def _add_slider(fig: go.Figure, dim: str, labels: Sequence[Any]) -> None:
    """Each position shows its own traces."""
    each = len(fig.data) // len(labels)
    steps = [
        {
            "label": str(label),
            "method": "restyle",
            "args": [{"visible": [trace // each == step for trace in range(len(fig.data))]}],
        }
        for step, label in enumerate(labels)
    ]
    current = {"prefix": f"{dim.capitalize()} ", "font": {"size": 13, "color": style.SOFT}}
    fig.update_layout(sliders=[{"active": 0, "steps": steps, "currentvalue": current, "pad": {"t": 20}}])
