"""Figures of agreement hold its numbers, and no name reaches Plotly unescaped."""

from __future__ import annotations

import json

import numpy as np
import pytest

from headscope.interp import plots
from headscope.interp.analysis.agreement import Agreement, agree
from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.results.scores import HeadScores

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture
def found() -> Agreement:
    values = np.random.default_rng(0).random((3, 4, 6))
    values[1] = values[0] + 0.01 * values[1]
    values[2, 1] = np.nan
    return agree([HeadScores(name, x[None]) for name, x in zip(("a", "b", ATTACK), values, strict=True)], k=4)


@pytest.mark.parametrize("measure", ["spearman", "jaccard"])
def test_a_map_says_every_pair_and_its_nulls(found: Agreement, measure: str) -> None:
    heat = plots.agreement_map(found, measure).data[0]
    np.testing.assert_array_equal(np.array(heat.z, dtype=float), found.matrix(measure).to_numpy())
    assert (heat.zmin, heat.zmax) == ((-1, 1) if measure == "spearman" else (0, 1))
    row = found.pairs[(found.pairs["measure"] == measure) & (found.pairs["null"] == "within layers")].iloc[0]
    hover = heat.customdata[0][1]
    assert f"{row['observed']:.3f}" in hover and f"{row['null_mean']:.3f}" in hover and "all heads" in hover
    assert heat.text[0][1] == f"{row['observed']:.2f}*" and heat.customdata[1][0] == hover


def test_a_scatter_names_heads_and_tells_shared_ones(found: Agreement) -> None:
    fig = plots.score_scatter(found)
    assert len(fig.data) == 6 and [trace.visible for trace in fig.data] == [True, True, False, False, False, False]
    shared = {f"L{layer}H{head}" for layer, head in found.shared("a", "b")}
    assert set(fig.data[1].text) == shared and fig.data[1].marker.color == style.CONTRAST
    names = {*fig.data[0].text, *fig.data[1].text}
    assert len(names) == 18 and not any(name.startswith("L1H") for name in names)  # layer 1 was left out
    layer, head = map(int, fig.data[0].text[0][1:].split("H"))
    assert fig.data[0].x[0] == found.values[0, layer, head] and fig.data[0].y[0] == found.values[1, layer, head]
    buttons = fig.layout.updatemenus[0].buttons
    assert len(buttons) == 3 and buttons[1].args[0]["visible"] == [False, False, True, True, False, False]
    assert len(plots.score_scatter(found, pairs=1).data) == 2 and not plots.score_scatter(found, 1).layout.updatemenus


def test_names_are_escaped_and_bad_requests_named(found: Agreement) -> None:
    for fig in (plots.agreement_map(found), plots.agreement_map(found, "jaccard"), plots.score_scatter(found)):
        assert "<img" not in json.dumps(json.loads(fig.to_json()), ensure_ascii=False)
    with pytest.raises(HeadscopeError, match="choose 'spearman' or 'jaccard'"):
        plots.agreement_map(found, "pearson")
    with pytest.raises(HeadscopeError, match="draw nothing"):
        plots.score_scatter(found, 0)


def test_a_constant_score_is_crossed_out() -> None:
    values = np.random.default_rng(0).random((4, 6))
    found = agree([HeadScores("a", values[None]), HeadScores("b", np.ones((1, 4, 6)))])
    fig = plots.agreement_map(found)
    assert len(fig.data[1].x) == 2 and fig.data[0].text[0][1] == ""
