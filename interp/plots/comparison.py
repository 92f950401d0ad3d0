"""Several methods or runs beside each other: how alike every two are, and one score against another, head by head."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from headscope.interp.analysis.agreement import Agreement, Measure
from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style

MENU = 15  # pairs that a scatter offers
_WORDS = {"spearman": "Rank correlation", "jaccard": "Jaccard index"}


def agreement_map(found: Agreement, measure: Measure = "spearman") -> go.Figure:
    """How alike every two methods are: a cell a pair, with the nulls on hover.

    ``measure`` is "spearman" (from -1 to 1, colours centred at 0) or "jaccard" (of the top k, from 0 to 1). A cell says
    the observed value; a star marks a pair outside what shuffles within layers give (Holm-adjusted p below 0.05). A
    pair without a value is crossed out.

    Raises:
        HeadscopeError: another measure.
    """
    if measure not in _WORDS:
        raise HeadscopeError(f"measure={measure!r}: choose 'spearman' or 'jaccard'")
    values = found.matrix(measure).to_numpy(dtype=np.float64)
    hover, stars = _beside_nulls(found, measure)
    shown = [[_cell(value, star) for value, star in zip(*row, strict=True)] for row in zip(values, stars, strict=True)]
    what = _WORDS[measure] + (f" of the top {found.k}" if measure == "jaccard" else "")
    signed = measure == "spearman"
    size = 46 * len(found.names)
    subtitle = f"{found.heads} heads; *: not as shuffled within layers (Holm p &lt; 0.05)"
    fig = style.figure(f"{what} between methods", subtitle, inner=max(180, size), width=max(700, 330 + size))
    fig.add_heatmap(
        z=values,
        text=shown,
        customdata=hover,
        zmin=-1 if signed else 0,
        zmax=1,
        colorscale=style.DIVERGING if signed else style.SEQUENTIAL,
        colorbar=style.colour_bar(_WORDS[measure]),
        texttemplate="%{text}" if len(found.names) <= 12 else None,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{customdata}<extra></extra>",
    )
    style.cross_out(fig, np.isnan(values), hover, "no value")
    names = [style.show_text(name, 40) for name in found.names]
    fig.update_xaxes(**style.cells(names, len(names)))
    return fig.update_yaxes(**style.cells(names, len(names), downwards=True))


def _cell(value: float, star: bool) -> str:
    return "" if np.isnan(value) else f"{value:.2f}{'*' if star else ''}"


def _beside_nulls(found: Agreement, measure: Measure) -> tuple[NDArray[np.object_], NDArray[np.bool_]]:
    """What the hover says of every pair, and whether it stands out of the null within layers."""
    at = {name: place for place, name in enumerate(found.names)}
    hover = np.full((len(at), len(at)), "", dtype=object)
    stars = np.zeros((len(at), len(at)), dtype=bool)
    for name, place in at.items():
        hover[place, place] = f"<b>{style.show_text(name)}</b>"
    rows = found.pairs[found.pairs["measure"] == measure]
    for _, row in rows.iterrows():
        a, b = at[row["a"]], at[row["b"]]
        if not hover[a, b]:
            hover[a, b] = f"<b>{style.show_text(row['a'])} and {style.show_text(row['b'])}</b>: {row['observed']:.3f}"
            hover[a, b] += f"<br>{row['shared']:g} of the top {found.k} shared"
        hover[a, b] += f"<br>shuffled {row['null']}: {row['null_mean']:.3f} "
        hover[a, b] += f"{style.interval_text(row['null_low'], row['null_high'])}, p = {row['p_holm']:.2g}"
        stars[a, b] |= bool(row["null"] == "within layers" and row["p_holm"] < 0.05)
        hover[b, a], stars[b, a] = hover[a, b], stars[a, b]
    return hover, stars


def score_scatter(found: Agreement, pairs: int = MENU) -> go.Figure:
    """The scores of every head by one method against those by another; heads that both have in their top k stand out.

    A menu chooses the pair, those that share the most top heads first, ``pairs`` at most. The hover names the head.

    Raises:
        HeadscopeError: no pair.
    """
    if pairs < 1:
        raise HeadscopeError(f"pairs={pairs} would draw nothing; choose at least 1")
    chosen = sorted(combinations(found.names, 2), key=lambda pair: -len(found.shared(*pair)))[:pairs]
    fig = style.figure("Scores of every head", f"red: in the top {found.k} of both", inner=460, width=760)
    for number, (a, b) in enumerate(chosen):
        _add_pair(fig, found, a, b, visible=number == 0)
    axes = [{"xaxis.title.text": style.show_text(a), "yaxis.title.text": style.show_text(b)} for a, b in chosen]
    fig.update_xaxes(title_text=axes[0]["xaxis.title.text"]).update_yaxes(title_text=axes[0]["yaxis.title.text"])
    if len(chosen) == 1:
        return fig
    buttons = [
        {
            "label": style.show_text(f"{a} and {b} ({len(found.shared(a, b))} shared)", 60),
            "method": "update",
            "args": [{"visible": [number == i // 2 for i in range(2 * len(chosen))]}, axes[number]],
        }
        for number, (a, b) in enumerate(chosen)
    ]
    menu = {**style.MENU, "buttons": buttons, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    return fig.update_layout(updatemenus=[menu])


def _add_pair(fig: go.Figure, found: Agreement, a: str, b: str, *, visible: bool) -> None:
    """Two traces: the heads that are not in both top k, and those that are."""
    x, y = (found.values[found.names.index(name)] for name in (a, b))
    both = np.zeros(x.shape, dtype=bool)
    for pair in found.shared(a, b):
        both[pair] = True
    counted = np.ones(x.shape, dtype=bool)
    counted[list(found.left_out)] = False
    for inside, colour in ((counted & ~both, style.ACCENT), (counted & both, style.CONTRAST)):
        layer, head = np.nonzero(inside)
        fig.add_scatter(
            x=style.drawn(x[inside]),
            y=style.drawn(y[inside]),
            mode="markers",
            marker={"color": colour, "size": 7, "opacity": 0.7},
            text=[f"L{i}H{j}" for i, j in zip(layer, head, strict=True)],
            hovertemplate="<b>%{text}</b><br>%{x:.3f}, %{y:.3f}<extra></extra>",
            showlegend=False,
            visible=visible,
        )
