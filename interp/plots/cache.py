"""What policies for a cache lose: against their budget, head by head, and how far they keep the same keys."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.results.cache import MEASURES, CacheLosses


def budget_curve(found: CacheLosses, measure: str = "recall") -> go.Figure:
    """A measure against the budget, a line a policy: means over layers, heads and prompts, bars for the intervals over
    prompts. Budgets stand in the order in which they were given, at equal distances.

    Raises:
        HeadscopeError: no such measure, or no policy that has it.
    """
    if measure not in MEASURES:
        raise HeadscopeError(f"there is no measure {measure!r}; choose {', '.join(MEASURES)}")
    frame = found.to_frame()
    frame = frame[frame[measure].notna()]
    if frame.empty:
        raise HeadscopeError(f"no policy has {measure}, so there is nothing to draw")
    bars = "" if found.few else f", bars: {found.level:.0%} interval over them"
    fig = style.figure(
        f"{measure.capitalize()} by budget", f"mean over heads and {found.prompts} prompts{bars}", inner=320
    )
    colours = style.TEMPLATE.layout.colorway
    policies = [policy for policy in found.policies if policy in set(frame["policy"])]
    beside = min(0.04, 0.5 / len(policies))  # so that their bars do not cover each other
    for place, policy in enumerate(policies):
        i = found.policies.index(policy)  # its colour, also beside fewer others
        own = frame[frame["policy"] == policy]
        above, below = (abs(own[f"ci_{end}_{measure}"] - own[measure]).fillna(0.0) for end in ("high", "low"))
        fig.add_scatter(
            x=[found.budgets.index(budget) + beside * (place - (len(policies) - 1) / 2) for budget in own["budget"]],
            y=own[measure],
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "width": 3},
            mode="lines+markers",
            name=style.show_text(policy),
            line={"color": colours[i % len(colours)], "dash": "solid" if i < len(colours) else "dash"},
            hovertemplate=f"{style.show_text(policy)}<br>{measure}: %{{y:.3f}}<extra></extra>",
        )
    words = [budget if "." not in budget else f"{float(budget):.0%}" for budget in found.budgets]
    fig.update_xaxes(title_text="Budget (keys, or share of the prompt)", **style.ticks(words, 20))
    return fig.update_yaxes(title_text=f"{measure.capitalize()} ({MEASURES[measure]})")


def policy_map(found: CacheLosses, budget: str | None = None, measure: str = "recall") -> go.Figure:
    """A measure of every head under every policy at one ``budget`` (None: the first): policies along y, heads in model
    order along x.

    Raises:
        HeadscopeError: no such budget or measure, or no policy that has it.
    """
    budget = found.budgets[0] if budget is None else str(budget)
    if budget not in found.budgets:
        raise HeadscopeError(f"there is no budget {budget}; choose {', '.join(found.budgets)}")
    values = found.mean(measure)[:, found.budgets.index(budget)]
    policies, layers, heads = values.shape
    flat = values.reshape(policies, layers * heads)
    if np.isnan(flat).all():
        raise HeadscopeError(f"no policy has {measure}, so there is nothing to draw")
    names = np.array([[f"L{i}H{h}" for i in range(layers) for h in range(heads)]] * policies, dtype=object)
    title, label = f"{measure.capitalize()} of every head at a budget of {budget}", style.show_text(MEASURES[measure])
    fig = style.figure(title, "mean over prompts", inner=max(120, 28 * policies), plot_bgcolor=style.RULE)
    fig.add_heatmap(
        z=style.drawn(flat),
        customdata=names,
        colorscale=style.SEQUENTIAL,
        zmin=0.0 if measure == "recall" else None,
        zmax=1.0 if measure == "recall" else None,
        colorbar=style.colour_bar(label),
        hoverongaps=False,
        hovertemplate="%{y}<br>%{customdata}: %{z:.3f}<extra></extra>",
    )
    ticks = list(range(0, layers * heads, heads * style.thin(layers, 16)))
    words = [f"L{at // heads}" for at in ticks]
    fig.update_xaxes(title_text="Head, layer by layer", showgrid=False, tickvals=ticks, ticktext=words)
    shown = [style.show_text(policy, 40) for policy in found.policies]
    return fig.update_yaxes(**style.cells(shown, policies, downwards=True))


def overlap_map(found: CacheLosses, budget: str | None = None) -> go.Figure:
    """The share of kept keys that two policies have in common (Jaccard) at one ``budget`` (None: the first), over
    layers, heads and prompts; a cross where a policy keeps no fixed keys.

    Raises:
        HeadscopeError: no such budget.
    """
    budget = found.budgets[0] if budget is None else str(budget)
    if budget not in found.budgets:
        raise HeadscopeError(f"there is no budget {budget}; choose {', '.join(found.budgets)}")
    values = found.overlap[:, :, found.budgets.index(budget)].mean(-1)
    shown = [style.show_text(policy, 40) for policy in found.policies]
    names = np.array([[f"{a} and {b}" for b in shown] for a in shown], dtype=object)
    side = max(160, 34 * len(shown))
    fig = style.figure(f"Keys in common at a budget of {budget}", "×: no fixed keys", inner=side, width=side + 320)
    text = np.where(np.isnan(values), "", np.vectorize("{:.2f}".format)(np.nan_to_num(values)))
    fig.add_heatmap(
        z=values,
        text=text,
        texttemplate="%{text}",
        customdata=names,
        zmin=0,
        zmax=1,
        colorscale=style.SEQUENTIAL,
        colorbar=style.colour_bar("Jaccard"),
        hoverongaps=False,
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
    )
    style.cross_out(fig, np.isnan(values), names, "no fixed keys")
    fig.update_xaxes(**style.cells(shown, len(shown)))
    return fig.update_yaxes(**style.cells(shown, len(shown), downwards=True))
