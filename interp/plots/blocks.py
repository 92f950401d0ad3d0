"""One head's map of blocks: the whole pattern of a long text in one picture."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.plots.pattern import FLOOR, add_switch, colours

MOST = 1024  # blocks a side


def block_map(
    record: xr.Dataset, layer: int, head: int, *, example: int = 0, title: str | None = None, log: bool = True
) -> go.Figure:
    """The ``block_map`` of head (``layer``, ``head``) of a record (see ``statistics.BlockMap``): query blocks down, key
    blocks across, in tokens from the example's first.

    ``log`` colours the logarithm, from 0.0001 to 1, which shows what lies beside a sink; maps of sums are coloured as
    they are. Blocks beyond a query are blank.

    Raises:
        HeadscopeError: no map in the record, no such layer, head or example, or more than 1,024 blocks a side.
    """
    if "block_map" not in record.data_vars:
        raise HeadscopeError("the record holds no block_map; trace BlockMap(size) with it")
    variable = record["block_map"]
    for dim, index in (("layer", layer), ("head", head), ("example", example)):
        if dim not in variable.dims:
            raise HeadscopeError(f"this block_map has no dimension {dim} left; give the record, not one {dim} of it")
        known = variable[dim].to_numpy()
        if index not in known:
            raise HeadscopeError(f"the record has no {dim} {index}; it has {known.min()} to {known.max()}")
    values = variable.sel(layer=layer, head=head, example=example).to_numpy().astype(np.float64)
    real = ~np.isnan(values).all(1)
    values, size = values[real][:, ~np.isnan(values).all(0)], int(variable.attrs["block"])
    if max(values.shape) > MOST:
        raise HeadscopeError(f"a map of {values.shape[0]} blocks a side is too large to read; trace larger blocks")
    down, across = (size * np.arange(n) for n in values.shape)
    values[(across[None, :] > down[:, None]) & (values == 0)] = np.nan
    weights = bool(np.nanmax(values) <= 1 + 1e-3)
    log = log and weights
    fig = style.figure(title or f"Blocks of head L{layer}H{head}", f"{size} x {size} tokens", inner=520, width=700)
    fig.add_heatmap(
        z=np.log10(np.maximum(values, FLOOR)) if log else values,
        x=across + (size - 1) / 2,
        y=down + (size - 1) / 2,
        customdata=values,
        text=[[f"queries {q} to {q + size - 1}<br>keys {k} to {k + size - 1}" for k in across] for q in down],
        colorscale=style.SEQUENTIAL,
        hoverongaps=False,
        hovertemplate="<b>%{customdata:.4f}</b><br>%{text}<extra></extra>",
        **colours(values, log=log),
    )
    if weights:
        add_switch(fig, values, log=log)
    fig.update_xaxes(title_text="Key position (tokens)", showgrid=False)
    return fig.update_yaxes(title_text="Query position (tokens)", showgrid=False, autorange="reversed")
