"""Layer x head pictures: a score of every head, the best heads in order, a recorded statistic of every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.results.scores import HeadScores

REDUCTIONS = ("mean", "median", "max", "min", "std")


def head_map(
    scores: HeadScores | NDArray[Any],
    *,
    title: str,
    label: str,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    n: ArrayLike | None = None,
    diverging: bool | None = None,
) -> go.Figure:
    """One value for each head: layers along x, heads along y, a colour for the value.

    ``scores`` is HeadScores, which brings its intervals and counts, or an array (layer, head) with optional bounds
    ``low`` and ``high`` and counts ``n`` of the same shape; the hover shows them. ``label`` names the value.
    ``diverging`` centres the colours at 0, blue below and red above; by default where a value is below 0. Cells without
    a value are crossed out.

    Raises:
        HeadscopeError: nothing to draw, or shapes that disagree.
    """
    if isinstance(scores, HeadScores):
        bounds = scores.interval
        low, high = bounds[0] if low is None else low, bounds[1] if high is None else high
        n, scores = scores.n if n is None else n, scores.mean
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2:
        raise HeadscopeError(f"a head map needs values of shape (layer, head), not {values.shape}")
    layers, heads = range(values.shape[0]), range(values.shape[1])
    extra = _hover_lines(values.shape, low, high, n)
    if np.isnan(values).all():  # also true of an empty array
        raise HeadscopeError("the head map has no value that is a number, so there is nothing to draw")
    diverging = style.signed(values) if diverging is None else diverging
    ends = style.colour_range(values, diverging=diverging)
    colours = style.DIVERGING if diverging else style.SEQUENTIAL
    return _draw_map(values, layers, heads, extra, title=title, label=label, ends=ends, colours=colours)


def _hover_lines(
    shape: tuple[int, ...], low: ArrayLike | None, high: ArrayLike | None, n: ArrayLike | None
) -> NDArray[np.object_]:
    """What the hover says below a head's value: interval and count, (layer, head)."""
    given = {"low": low, "high": high, "n": n}
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in given.items() if values is not None}
    for name, array in arrays.items():
        if array.shape != shape:
            raise HeadscopeError(f"{name} has shape {array.shape}, the head map's values have {shape}")
    if ("low" in arrays) != ("high" in arrays):
        raise HeadscopeError("an interval needs both ends: give low and high, or neither")
    lines = np.full(shape, "", dtype=object)
    for at in np.ndindex(*shape):
        if "low" in arrays:
            lines[at] += (
                f"<br>interval {style.interval_text(float(arrays['low'][at]), float(arrays['high'][at])) or 'none'}"
            )
        if "n" in arrays:
            lines[at] += f"<br>n = {int(arrays['n'][at])}"
    return lines


def _draw_map(
    values: NDArray[np.float64],
    layers: Sequence[Any],
    heads: Sequence[Any],
    extra: NDArray[np.object_],
    *,
    title: str,
    label: str,
    ends: tuple[float, float],
    colours: str = style.SEQUENTIAL,
) -> go.Figure:
    label = style.show_text(label)
    names = np.array([[f"Layer {layer}, head {head}" for head in heads] for layer in layers], dtype=object)
    cell = min(34, max(9, 860 // len(layers)))
    subtitle = "×: no data" if np.isnan(values).any() else ""
    inner, width = min(760, max(190, cell * len(heads))), 200 + 34 * len(layers)
    fig = style.figure(title, subtitle, inner=inner, width=width, plot_bgcolor=style.RULE)
    fig.add_heatmap(
        z=style.drawn(values.T),
        text=extra.T,
        customdata=names.T,
        zmin=ends[0],
        zmax=ends[1],
        colorscale=colours,
        colorbar=style.colour_bar(label),
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate=f"<b>%{{customdata}}</b><br>{label}: %{{z:.3f}}%{{text}}<extra></extra>",
    )
    style.cross_out(fig, np.isnan(values.T), names.T, "no data")
    fig.update_xaxes(title_text="Layer", **style.cells(layers, 32))
    return fig.update_yaxes(title_text="Head", **style.cells(heads, 20, downwards=True))


def ranked(scores: HeadScores, k: int = 20, *, label: str = "score") -> go.Figure:
    """The ``k`` highest-scoring heads, best on top, each with its bootstrap interval (all heads where there are fewer).
    ``label`` names the score, with its unit.

    Raises:
        HeadscopeError: ``k`` is not positive, or no head has a score.
    """
    if k < 1:
        raise HeadscopeError(f"ranked(k={k}) would draw no head; choose k of at least 1")
    frame = scores.to_frame().dropna(subset="score").head(k)
    if frame.empty:
        raise HeadscopeError(f"{scores.method}: no head has a score, so there is nothing to rank")
    rows = np.arange(len(frame))
    names = [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    intervals = [style.interval_text(*pair) for pair in zip(frame["ci_low"], frame["ci_high"], strict=True)]
    hover = [
        f"<b>{name}</b><br>score: {score:.3f}<br>interval {interval or 'none'}<br>n = {n}"
        for name, score, interval, n in zip(names, frame["score"], intervals, frame["n"], strict=True)
    ]
    level = f"{scores.level:.0%} bootstrap interval over {int(frame['n'].max())} trials" if any(intervals) else ""
    title = f"Highest {scores.method.replace('_', ' ')} scores"
    fig = style.figure(title, level, inner=20 * len(frame) + 12, showlegend=False)
    x, y = style.segments(frame["ci_low"], frame["ci_high"], rows)
    fig.add_scatter(x=x, y=y, mode="lines", line={"color": style.ACCENT, "width": 2}, opacity=0.5, hoverinfo="skip")
    marker = {"color": style.ACCENT, "size": 9, "line": {"color": "white", "width": 1}}
    template = "%{text}<extra></extra>"
    fig.add_scatter(x=frame["score"], y=rows, mode="markers", marker=marker, text=hover, hovertemplate=template)
    ends = frame[["score", "ci_low", "ci_high"]].to_numpy(dtype=np.float64)
    left, right = min(0.0, float(np.nanmin(ends))), max(0.0, float(np.nanmax(ends)))
    room = 0.02 * (right - left) or 0.05  # or the best head's interval would end at the frame
    shown = [left - room * (left < 0), right + room]
    fig.update_xaxes(title_text=style.show_text(label).capitalize(), range=shown)
    return fig.update_yaxes(range=[len(frame) - 0.4, -0.6], **style.ticks(names, 60))


def statistic_map(record: xr.Dataset, name: str, reduce: str = "mean") -> go.Figure:
    """A recorded statistic of every head: ``reduce`` over examples and queries, NaN left out.

    ``reduce`` is mean, median, max, min or std. Layers and heads are named by the record's coordinates.

    Raises:
        HeadscopeError: no such variable or reduction, or other dimensions than example, layer, head and query.
    """
    if reduce not in REDUCTIONS:
        raise HeadscopeError(f"unknown reduction {reduce!r}; choose one of {', '.join(REDUCTIONS)}")
    variable = variable_of(record, name)
    if variable.isnull().all():
        raise HeadscopeError(f"{name} is NaN everywhere, so there is nothing to draw")
    over = [dim for dim in variable.dims if dim not in ("layer", "head")]
    variable = variable.transpose("layer", "head", *over)
    count = variable.notnull().sum(over).to_numpy()
    empty = count == 0
    reduced = getattr(variable.where(~xr.DataArray(empty, dims=("layer", "head")), 0.0), reduce)(over, skipna=True)
    values = np.where(empty, np.nan, reduced.to_numpy().astype(np.float64))
    layers, heads = (variable[dim].to_numpy().tolist() for dim in ("layer", "head"))
    words = name.replace("_", " ")
    title = f"{words.capitalize()} of every head"
    extra = _hover_lines(values.shape, None, None, count)
    signed = style.signed(values)
    ends = style.colour_range(values, diverging=signed, zero=False)
    label = f"{reduce} {style.with_unit(name)}".capitalize()
    colours = style.DIVERGING if signed else style.SEQUENTIAL
    return _draw_map(values, layers, heads, extra, title=title, label=label, ends=ends, colours=colours)


def variable_of(record: xr.Dataset, name: str) -> xr.DataArray:
    """A record's variable with dimensions layer, head and at most example and query; HeadscopeError otherwise."""
    if name not in record.data_vars:
        known = ", ".join(map(str, record.data_vars)) or "none"
        raise HeadscopeError(f"the record has no statistic {name!r}; it has: {known}")
    variable = record[name]
    dims = {str(dim) for dim in variable.dims}
    if not {"layer", "head"} <= dims <= {"example", "layer", "head", "query"}:
        raise HeadscopeError(
            f"{name} has the dimensions {', '.join(map(str, variable.dims))}; "
            "select until only example, layer, head and query are left"
        )
    if variable.size == 0:
        raise HeadscopeError(f"{name} holds no values, so there is nothing to draw")
    return variable
