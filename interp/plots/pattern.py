"""One head's attention pattern with the tokens on its axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style

CELLS = 256 * 256
FLOOR = 1e-4  # the lower end of the logarithmic colours
LABELS = 64


def pattern(
    weights: NDArray[Any],
    tokens_query: list[str],
    tokens_key: list[str],
    *,
    title: str,
    query_offset: int | None = None,
    key_offset: int = 0,
    causal: bool = True,
    log: bool = True,
) -> go.Figure:
    """One head's pattern (query, key): which keys each query attends to, with token texts on both axes.

    The axes are positions, so a repeated token keeps its own row and column. Row ``i`` stands at ``query_offset + i``
    and column ``j`` at ``key_offset + j``; by default the queries are the last of the keys. ``causal`` leaves the cells
    above the diagonal blank. ``log`` begins with colours of the logarithm, from 0.0001 to 1, which show what lies
    beside a sink; a menu switches. Values below 0 (a difference of two patterns) have colours centred at 0 instead.

    Raises:
        HeadscopeError: token lists that do not fit the weights, weight on keys that a causal query cannot see, or more
            than 65,536 cells (pass a tile and its offsets).
    """
    values = np.array(weights, dtype=np.float64)
    offset = key_offset + len(tokens_key) - len(tokens_query) if query_offset is None else query_offset
    _check(values, tokens_query, tokens_key)
    queries, keys = offset + np.arange(len(tokens_query)), key_offset + np.arange(len(tokens_key))
    if causal:
        hidden = keys[None, :] > queries[:, None]
        if np.nanmax(np.abs(values), where=hidden, initial=0.0) > 1e-6:
            raise HeadscopeError("the pattern puts weight on later keys; pass causal=False, or the right query_offset")
        values[hidden] = np.nan
    seen = [style.show_token(token) for token in tokens_query], [style.show_token(token) for token in tokens_key]
    return _draw(values, queries, keys, *seen, title=title, log=log)


def _check(values: NDArray[np.float64], tokens_query: list[str], tokens_key: list[str]) -> None:
    if values.shape != (len(tokens_query), len(tokens_key)):
        raise HeadscopeError(
            f"the pattern has shape {values.shape}, but there are {len(tokens_query)} query and {len(tokens_key)} key "
            "tokens; pass weights (query, key) of one head and one token for each"
        )
    if values.size == 0 or np.isnan(values).all():
        raise HeadscopeError("the pattern holds no weights, so there is nothing to draw")
    if values.size > CELLS:
        raise HeadscopeError(
            f"a pattern of {values.shape[0]} x {values.shape[1]} cells is too large to read; pass a tile of at most "
            "256 x 256 with its query_offset and key_offset, or draw plots.head_on_prompt or plots.block_map"
        )


def _draw(
    values: NDArray[np.float64],
    queries: NDArray[np.int64],
    keys: NDArray[np.int64],
    text_query: list[str],
    text_key: list[str],
    *,
    title: str,
    log: bool,
) -> go.Figure:
    cell = min(26, max(4, 800 // len(keys)))
    labels = 5 * max(map(len, text_key)) // 2 + 30
    inner = min(1200, max(160, cell * len(queries))) + labels
    fig = style.figure(title, inner=inner, width=300 + 26 * len(keys))
    rows = [f"<br>query {q}: {token}" for q, token in zip(queries, text_query, strict=True)]
    columns = [f"<br>key {k}: {token}" for k, token in zip(keys, text_key, strict=True)]
    shown = np.isfinite(values)
    hover = [
        [f"<b>{values[i, j]:.4f}</b>{row}{column}" if shown[i, j] else "" for j, column in enumerate(columns)]
        for i, row in enumerate(rows)
    ]
    signed = style.signed(values)
    log = log and not signed
    fig.add_heatmap(
        z=np.log10(np.maximum(values, FLOOR)) if log else values,
        x=keys,
        y=queries,
        text=hover,
        colorscale=style.DIVERGING if signed else style.SEQUENTIAL,
        hoverongaps=False,
        hovertemplate="%{text}<extra></extra>",
        **colours(values, log=log),
    )
    if not signed:
        add_switch(fig, values, log=log)
    fig.update_xaxes(title_text="Key (token)", tickangle=-90, range=_ends(keys), **_token_ticks(keys, text_key))
    return fig.update_yaxes(title_text="Query (token)", range=_ends(queries)[::-1], **_token_ticks(queries, text_query))


def colours(values: NDArray[np.float64], *, log: bool) -> dict[str, Any]:
    """Colour ends and bar of attention weights, or of their logarithms from ``FLOOR`` to 1."""
    bar = style.colour_bar("Attention weight")
    if log:
        powers = list(range(round(np.log10(FLOOR)), 1))
        bar |= {"tickvals": powers, "ticktext": [f"≤ {FLOOR:g}"] + [f"{10.0**p:g}" for p in powers[1:]]}
        return {"zmin": powers[0], "zmax": 0, "colorbar": bar}
    low, high = style.colour_range(values, diverging=style.signed(values))
    return {"zmin": low, "zmax": high, "colorbar": bar}


def add_switch(fig: go.Figure, values: NDArray[np.float64], *, log: bool) -> None:
    """A menu above the map of ``values``: colours of the logarithm, or linear ones; it names those that are shown."""
    buttons = []
    for name, power in (("log colours", True), ("linear colours", False)):
        z = np.log10(np.maximum(values, FLOOR)) if power else values
        look = colours(values, log=power)
        shown = {"z": [[[None if np.isnan(x) else round(x, 6) for x in row] for row in z.tolist()]]}
        bar = {f"colorbar.{key}": [look["colorbar"].get(key)] for key in ("tickvals", "ticktext")}
        ends = {key: [look[key]] for key in ("zmin", "zmax")}
        buttons.append({"label": name, "method": "restyle", "args": [{**shown, **bar, **ends}]})
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 4, "t": 0}}
    menu = {**style.MENU, "active": 0 if log else 1}
    fig.update_layout(updatemenus=[{**menu, **place, "buttons": buttons}])
    room = 30  # between the title and the buttons
    fig.update_layout(height=fig.layout.height + room, margin={"t": fig.layout.margin.t + room})


def _ends(positions: NDArray[np.int64]) -> list[float]:
    return [float(positions[0]) - 0.5, float(positions[-1]) + 0.5]


def _token_ticks(positions: NDArray[np.int64], texts: list[str]) -> dict[str, Any]:
    every = style.thin(len(texts), LABELS)
    labels = {"tickvals": positions[::every].tolist(), "ticktext": texts[::every], "tickmode": "array"}
    return {**labels, "showgrid": False, "tickfont": {"size": 11 if len(texts) <= 32 else 9}}
