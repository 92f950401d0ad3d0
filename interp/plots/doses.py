"""Dose and response: a task's score over the values of an edit's setting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from headscope.interp.plots import style

COLUMNS = ["task", "edit", "setting", "value", "mean", "ci_low", "ci_high", "random", "n"]


def dose_response(
    frame: pd.DataFrame, metrics: Mapping[str, str] | None = None, base: float | None = None
) -> go.Figure:
    """The mean score with its interval against the value of one setting, a line an edit, of one task.

    ``frame`` is of ``headscope.interp.results.doses.doses``, the rows of one task and setting. ``base`` is the score
    without an edit, drawn as a dotted line; random heads (or vectors) at the same values are a pale one, where there
    are any. ``metrics`` says what the task's numbers mean (task -> unit).

    Raises:
        HeadscopeError: missing columns, or no rows.
    """
    style.require(frame, COLUMNS, "a dose-response plot")
    task, setting = str(frame["task"].iloc[0]), str(frame["setting"].iloc[0])
    fig = style.figure(f"{task} by {setting}", "bar: interval, pale: random controls", inner=300)
    several = frame["edit"].nunique() > 1  # one edit has the colours that it has beside its baseline: see evaluation
    colours = style.TEMPLATE.layout.colorway if several else (style.CONTRAST,)
    for at, (edit, rows) in enumerate(frame.groupby("edit", sort=False)):
        rows = rows.sort_values("value")
        colour, name = colours[at % len(colours)], style.show_text(edit, 36)
        hover = [
            f"<b>{name}</b><br>{style.show_text(setting)} = {row['value']:g}: {row['mean']:.3f}"
            f"<br>interval {style.interval_text(row['ci_low'], row['ci_high']) or 'none'}<br>n = {row['n']}"
            for row in rows.to_dict("records")
        ]
        fig.add_scatter(
            x=rows["value"],
            y=rows["mean"],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": rows["ci_high"] - rows["mean"],
                "arrayminus": rows["mean"] - rows["ci_low"],
                "thickness": 1.5,
            },
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": 2.5},
            text=hover,
            hovertemplate="%{text}<extra></extra>",
        )
        if rows["random"].notna().any():
            pale = {"color": colour if several else style.MUTED, "width": 1.5, "dash": "dash"}
            fig.add_scatter(
                x=rows["value"],
                y=rows["random"],
                mode="lines",
                line=pale,
                opacity=0.5 if several else 1.0,
                name=f"random for {name}",
            )
    if base is not None and np.isfinite(base):
        fig.add_hline(y=base, line={"color": style.SOFT, "width": 1, "dash": "dot"}, layer="below")
    unit = f" ({style.show_text(metrics[task], 40)})" if metrics and task in metrics else ""
    fig.update_xaxes(title_text=style.show_text(setting))
    return fig.update_yaxes(title_text=f"Mean{unit}")
