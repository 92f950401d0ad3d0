"""What a number did while models learned."""

from __future__ import annotations

import plotly.graph_objects as go

from headscope.interp.plots import style
from headscope.interp.results.findings import Findings


def learning_curve(found: Findings, label: str, number: str) -> go.Figure:
    """A number of the model ``label`` over training steps: the mean of the seeds, and each seed pale behind it.

    Raises:
        HeadscopeError: no such label, or number.
    """
    frame = found.curve(label, number)
    words = number.replace("_", " ")
    fig = style.figure(
        f"{words.capitalize()} of {label}", f"mean of {len(found.seeds)} seeds, pale: each", inner=300, showlegend=False
    )
    colour = style.TEMPLATE.layout.colorway[0]
    for seed, rows in frame.groupby("seed"):
        pale = {"line": {"color": colour, "width": 1}, "opacity": 0.35}
        fig.add_scatter(x=rows["step"], y=rows["value"], mode="lines", name=f"seed {seed}", **pale)
    mean = frame.groupby("step", as_index=False)["value"].mean()
    fig.add_scatter(x=mean["step"], y=mean["value"], mode="lines", line={"color": colour, "width": 2.5}, name="mean")
    fig.update_xaxes(title_text="Step")
    return fig.update_yaxes(title_text=style.show_text(words.capitalize()))
