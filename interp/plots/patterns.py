"""The map of patterns: heads whose attention looks alike lie close together."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from headscope.interp.analysis.pattern_embedding import PatternEmbedding
from headscope.interp.plots import style


def pattern_map(found: PatternEmbedding) -> go.Figure:
    """A point a head, at the two directions in which the codes of ``embed_patterns`` vary most, coloured by layer.

    The axes say how much of the codes' variance they hold; what they mean depends on the seed, distances less so. The
    hover names the head and the autoencoder's error on its maps. Codes of one number are drawn on a line.
    """
    layers, heads, width = found.codes.shape
    codes = found.codes.to_numpy().reshape(-1, width)  # merges layer and head
    centred = codes - codes.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    at = np.zeros((len(codes), 2))
    at[:, : min(2, len(s))] = (u * s)[:, :2]
    share = np.zeros(2)
    share[: min(2, len(s))] = (s**2 / max(float((s**2).sum()), np.finfo(float).tiny))[:2]
    number = np.repeat(found.codes["layer"].to_numpy(), heads)
    words = (
        f"held-out error {found.unexplained('autoencoder'):.2f} of the mean map's, PCA {found.unexplained('pca'):.2f}"
    )
    fig = style.figure("Map of patterns", words, inner=420, width=620)
    fig.add_scatter(
        x=at[:, 0],
        y=at[:, 1],
        mode="markers+text" if len(codes) <= 64 else "markers",
        text=[f"L{layer}H{head}" for layer, head in zip(number, list(range(heads)) * layers, strict=True)],
        textposition="top center",
        customdata=found.error_of.to_numpy().ravel(),
        marker={"color": number, "colorscale": style.SEQUENTIAL, "colorbar": style.colour_bar("Layer"), "size": 9},
        hovertemplate="<b>%{text}</b><br>error %{customdata:.3g}<extra></extra>",
    )
    fig.update_xaxes(title_text=f"First direction ({share[0]:.0%} of the codes' variance)")
    return fig.update_yaxes(title_text=f"Second direction ({share[1]:.0%})")
