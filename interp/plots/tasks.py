"""Task results: recall over length and depth, and interventions beside their baseline and controls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style

KINDS = {"baseline": style.INK, "intervention": style.CONTRAST, "control": style.MUTED}
EVALUATION = ["task", "condition", "kind", "mean", "ci_low", "ci_high", "delta", "delta_low", "delta_high", "n"]
ROW, GAP = 26, 84  # pixels: one condition, and what stands between two tasks


def needle_grid(frame: pd.DataFrame) -> go.Figure:
    """Needle recall by context length and needle depth.

    ``frame`` has a row a trial: length (tokens), depth (percent, 0 the beginning) and score (0 to 1, NaN: not run).
    A cell is the mean over its trials, the hover says how many; cells without a trial are crossed out.

    Raises:
        HeadscopeError: missing columns, no rows, no score, or scores outside 0 to 1.
    """
    kept = _checked_trials(frame)
    lengths, depths = (sorted(pd.to_numeric(frame[name]).dropna().unique().tolist()) for name in ("length", "depth"))
    cells = kept.groupby(["depth", "length"])["score"].agg(["mean", "count"])
    mean = cells["mean"].unstack().reindex(index=depths, columns=lengths)
    count = cells["count"].unstack().reindex(index=depths, columns=lengths).fillna(0).astype(int)
    places = [[f"{_number(length)} tokens, depth {_number(depth)}%" for length in lengths] for depth in depths]
    place = np.array(places, dtype=object)
    n = f"{count.to_numpy().sum()} trials" + (", ×: not run" if mean.isna().to_numpy().any() else "")
    inner, width = min(760, max(150, 36 * len(depths))), 220 + 110 * len(lengths)
    fig = style.figure("Needle recall by length and depth", n, inner=inner, width=width, plot_bgcolor=style.RULE)
    fig.add_heatmap(
        z=mean.to_numpy(),
        customdata=count.to_numpy(),
        text=place,
        zmin=0,
        zmax=1,
        colorscale=style.SEQUENTIAL,
        colorbar={**style.colour_bar("Recall"), "tickformat": ".0%"},
        texttemplate="%{z:.0%}" if mean.size <= 150 else None,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="<b>%{text}</b><br>recall: %{z:.1%}<br>n = %{customdata}<extra></extra>",
    )
    style.cross_out(fig, mean.isna().to_numpy(), place, "not run")
    fig.update_xaxes(title_text="Context length (tokens)", **style.cells([_number(v) for v in lengths], 16))
    shown = style.cells([f"{_number(v)}%" for v in depths], 24, downwards=True)
    return fig.update_yaxes(title_text="Needle depth", **shown)


def _checked_trials(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that have a score."""
    style.require(frame, ["length", "depth", "score"], "a needle grid")
    try:
        numbers = {name: pd.to_numeric(frame[name]) for name in ("length", "depth", "score")}
    except (ValueError, TypeError) as error:
        raise HeadscopeError(f"a needle grid needs numbers: {error}; give length, depth and score as such") from error
    kept = frame.assign(**numbers).dropna(subset=["length", "depth", "score"])
    if kept.empty:
        raise HeadscopeError("every score of the needle grid is NaN, so there is nothing to draw")
    if not kept["score"].between(0.0, 1.0).all():
        raise HeadscopeError("needle scores must lie between 0 and 1; divide percentages by 100")
    return kept


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def evaluation(frame: pd.DataFrame, metrics: Mapping[str, str] | None = None) -> go.Figure:
    """Every condition's result with its interval, and its difference to the baseline, a block of rows a task.

    ``frame`` has a row a task and condition: task, condition, kind (baseline, intervention or control), mean, ci_low,
    ci_high, delta, delta_low, delta_high (against the baseline, paired) and n. Controls that differ only in their seed
    ("random (seed 3)") share one row, drawn muted. ``metrics`` says what each task's numbers mean (task -> unit).

    Raises:
        HeadscopeError: missing columns, no rows, an unknown kind, or no mean at all.
    """
    style.require(frame, EVALUATION, "an evaluation plot")
    unknown = sorted(set(map(str, frame["kind"])) - set(KINDS))
    if unknown:
        raise HeadscopeError(f"unknown kind of condition {unknown[0]!r}; use one of {', '.join(KINDS)}")
    if frame["mean"].isna().all():
        raise HeadscopeError("every mean of the evaluation is NaN, so there is nothing to draw")
    blocks = [(str(task), _arrange(rows)) for task, rows in frame.groupby("task", sort=False)]
    columns = ["mean", "delta"] if frame["delta"].notna().any() else ["mean"]
    fig = _panels(blocks, columns, dict(metrics or {}))
    for at, (_, rows) in enumerate(blocks, start=1):
        for column, name in enumerate(columns, start=1):
            for kind in KINDS:
                _add_dots(fig, rows[rows["kind"] == kind], kind, name, at, column)
            _add_reference(fig, rows, name, at, column)
            fig.update_xaxes(range=_range(rows, name), row=at, col=column)
        labels = rows.drop_duplicates("row")
        names = [style.show_text(text, 44) for text in labels["label"]]
        axis = {"showgrid": False, "ticks": "", "tickmode": "array", "range": [labels["row"].max() + 0.6, -0.6]}
        fig.update_yaxes(tickvals=labels["row"].tolist(), ticktext=names, row=at, **axis)
        fig.update_yaxes(showticklabels=False, row=at, col=2) if len(columns) == 2 else None
    for kind in frame["kind"].unique():  # one legend entry a kind, whichever panels it appears in
        marker = {"color": KINDS[kind], "size": 9}
        fig.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=kind.capitalize(), row=1, col=1)
    return fig


def _arrange(rows: pd.DataFrame) -> pd.DataFrame:
    """One task's rows with their label, row number and height: baseline, interventions, then controls by group."""
    rows = rows.assign(order=rows["kind"].map({kind: i for i, kind in enumerate(KINDS)}))
    rows = rows.sort_values("order", kind="stable").reset_index(drop=True)
    control = rows["kind"] == "control"
    seedless = [re.sub(r"[\s,]*[(\[]?\bseed\W*\d+[)\]]?", "", str(name)).strip() for name in rows["condition"]]
    group = np.where(control, seedless, rows["condition"].astype(str))
    rows["row"] = pd.factorize(pd.Series(rows["order"].astype(str) + ":" + group))[0]
    size = rows.groupby("row")["row"].transform("size")
    rank = rows.groupby("row").cumcount()
    rows["label"] = [f"{name} (×{n})" if n > 1 else name for name, n in zip(group, size, strict=True)]
    rows["at"] = rows["row"] + np.where(size > 1, 0.64 * rank / np.maximum(size - 1, 1) - 0.32, 0.0)
    return rows


def _panels(blocks: list[tuple[str, pd.DataFrame]], columns: list[str], metrics: dict[str, str]) -> go.Figure:
    """The empty grid of panels, a row a task with room for its conditions."""
    heights = [ROW * (int(rows["row"].max()) + 1) + 14 for _, rows in blocks]
    inner = sum(heights) + GAP * (len(blocks) - 1)
    fig = make_subplots(
        rows=len(blocks),
        cols=len(columns),
        row_heights=heights,
        vertical_spacing=GAP / inner if len(blocks) > 1 else 0.0,
        horizontal_spacing=0.04,
        row_titles=None,
    )
    title = {"text": "Effect of each intervention", "subtitle": {"text": "dot: mean, bar: interval"}}
    legend = {"orientation": "h", "y": 1 + 22 / inner, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    legend |= {"itemclick": False, "itemdoubleclick": False}
    margin = {"t": 122, "b": 56}
    fig.update_layout(template=style.TEMPLATE, title=title, height=inner + 178, legend=legend, margin=margin)
    names = {"mean": "Mean", "delta": "Difference to baseline"}
    for at, (task, _) in enumerate(blocks, start=1):
        for column, name in enumerate(columns, start=1):
            unit = f" ({style.show_text(metrics[task], 40)})" if task in metrics else ""
            if unit or at == len(blocks):
                fig.update_xaxes(title_text=names[name] + unit, row=at, col=column)
    for at, (task, _) in enumerate(blocks, start=1):
        top = fig.get_subplot(at, 1).yaxis.domain[1]
        place: dict[str, Any] = {"x": 0, "y": top, "xref": "paper", "yref": "paper", "showarrow": False}
        fig.add_annotation(
            text=f"<b>{style.show_text(task, 80)}</b>",
            xanchor="left",
            yanchor="bottom",
            yshift=2,
            align="left",
            **place,
        )
    return fig


def _add_dots(fig: go.Figure, rows: pd.DataFrame, kind: str, name: str, at: int, column: int) -> None:
    """One kind's dots and intervals in one panel; ``name`` is mean or delta."""
    rows = rows[rows[name].notna()]
    if rows.empty or (kind == "baseline" and name == "delta"):
        return
    low, high = ("ci_low", "ci_high") if name == "mean" else ("delta_low", "delta_high")
    muted = kind == "control"
    panel: dict[str, Any] = {"row": at, "col": column, "showlegend": False}
    x, y = style.segments(rows[low], rows[high], rows["at"])
    line = {"color": KINDS[kind], "width": 1 if muted else 2.5}
    fig.add_scatter(x=x, y=y, mode="lines", line=line, opacity=0.55, hoverinfo="skip", **panel)
    word = "difference" if name == "delta" else "mean"
    hover = [
        f"<b>{style.show_text(row['condition'])}</b> ({kind})<br>{word}: {row[name]:.3f}"
        f"<br>interval {style.interval_text(row[low], row[high]) or 'none'}<br>n = {row['n']}"
        for row in rows.to_dict("records")
    ]
    marker = {"color": KINDS[kind], "size": 5 if muted else 10, "line": {"color": "white", "width": 0 if muted else 1}}
    template = "%{text}<extra></extra>"
    fig.add_scatter(
        x=rows[name], y=rows["at"], mode="markers", marker=marker, text=hover, hovertemplate=template, **panel
    )


def _range(rows: pd.DataFrame, name: str) -> list[float]:
    """Every dot and interval of a panel, the line of no difference too, with a little room on both sides."""
    names = ["mean", "ci_low", "ci_high"] if name == "mean" else ["delta", "delta_low", "delta_high"]
    values = rows[names].to_numpy(dtype=np.float64)
    shown = np.append(values[np.isfinite(values)], [0.0] if name == "delta" else [])
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.05
    return [float(low - room), float(high + room)]


def _add_reference(fig: go.Figure, rows: pd.DataFrame, name: str, at: int, column: int) -> None:
    """The dotted line to compare with: the baseline's mean, or no difference."""
    means = rows.loc[rows["kind"] == "baseline", "mean"].dropna()
    where = 0.0 if name == "delta" else (float(means.iloc[0]) if len(means) else None)
    if where is not None:
        line = {"color": style.SOFT, "width": 1, "dash": "dot"}
        fig.add_vline(x=where, line=line, layer="below", row=at, col=column)
