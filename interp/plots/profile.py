"""One head's recorded statistic along the query positions."""

from __future__ import annotations

import warnings

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.plots.maps import variable_of

BAND = (10, 90)  # percentiles over examples


def statistic_profile(record: xr.Dataset, name: str, layer: int, head: int) -> go.Figure:
    """A statistic of head (``layer``, ``head``) at every query position: mean over examples, and a band around it.

    The band runs from the 10th to the 90th percentile of the examples; with one example there is none. Positions where
    every example is NaN are left blank. ``layer`` and ``head`` are the record's coordinates.

    Raises:
        HeadscopeError: no such statistic, layer, head, or no query dimension.
    """
    variable = variable_of(record, name)
    if "query" not in variable.dims:
        raise HeadscopeError(f"{name} has no query dimension, so there is no profile; use statistic_map")
    for dim, index in (("layer", layer), ("head", head)):
        known = variable[dim].to_numpy()
        if index not in known:
            raise HeadscopeError(f"the record has no {dim} {index}; it has {known.min()} to {known.max()}")
    where = {dim: variable[dim].to_numpy().tolist().index(at) for dim, at in (("layer", layer), ("head", head))}
    chosen = variable.isel(where)
    if "example" not in chosen.dims:
        chosen = chosen.expand_dims("example")
    values = chosen.transpose("example", "query").to_numpy().astype(np.float64)
    if np.isnan(values).all():
        raise HeadscopeError(f"{name} of L{layer}H{head} is NaN everywhere, so there is nothing to draw")
    words = name.replace("_", " ")
    title = f"{words.capitalize()} of head L{layer}H{head}"
    return _draw_profile(
        variable["query"].to_numpy(), values, title=title, label=style.show_text(style.with_unit(name))
    )


def _draw_profile(query: np.ndarray, values: np.ndarray, *, title: str, label: str) -> go.Figure:
    with warnings.catch_warnings():  # a position without a value is a gap, not a problem
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(values, axis=0)
        low, high = np.nanpercentile(values, BAND, axis=0)
    count = np.sum(~np.isnan(values), axis=0)
    examples = len(values)
    band = f", band: {BAND[0]}th to {BAND[1]}th percentile" if examples > 1 else ""
    subtitle = f"mean over {examples} examples{band}" if examples > 1 else "one example"
    fig = style.figure(title, subtitle, inner=240, showlegend=False, hovermode="x unified")
    if examples > 1:
        _add_band(fig, query, low, high)
    text = [style.interval_text(*ends) if examples > 1 else "" for ends in zip(low, high, strict=True)]
    fig.add_scatter(
        x=query,
        y=mean,
        mode="lines" if len(query) > 1 else "markers",
        line={"color": style.ACCENT, "width": 2},
        customdata=count,
        text=text,
        hovertemplate=f"{label}: %{{y:.3f}} %{{text}}<br>n = %{{customdata}}<extra></extra>",
    )
    fig.update_xaxes(title_text="Query position (tokens)", showgrid=False)
    return fig.update_yaxes(title_text=label.capitalize())


def _add_band(fig: go.Figure, query: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """The band as one closed area for each run of positions that have values, so that it does not bridge gaps."""
    here = np.isfinite(low)
    starts = np.flatnonzero(here & ~np.concatenate(([False], here[:-1])))
    stops = np.flatnonzero(here & ~np.concatenate((here[1:], [False]))) + 1
    for first, stop in zip(starts, stops, strict=True):
        run = slice(first, stop)
        fig.add_scatter(
            x=np.concatenate((query[run], query[run][::-1])),
            y=np.concatenate((low[run], high[run][::-1])),
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor="rgba(31, 111, 139, 0.18)",
            hoverinfo="skip",
        )
