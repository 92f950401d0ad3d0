"""Figures hold the data they were given, and no text of a token or a name reaches Plotly unescaped."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr

from headscope.interp import plots
from headscope.interp.errors import HeadscopeError
from headscope.interp.plots import style
from headscope.interp.results.scores import HeadScores

ATTACK = "<img src=x onerror=alert(1)>"


def everything(fig: go.Figure) -> str:
    """Every string of a figure, as the browser reads it."""
    return json.dumps(json.loads(fig.to_json()), ensure_ascii=False)


def labels(axis) -> dict[float, str]:
    return dict(zip(axis.tickvals, axis.ticktext, strict=True))


@pytest.fixture
def scores() -> HeadScores:
    trials = np.random.default_rng(0).uniform(0, 0.2, (12, 4, 3))
    trials[:, 2, 1] += 0.7
    trials[:, 0, 0] += 0.3
    trials[:, 3, 2] = np.nan
    return HeadScores("retrieval", trials)


@pytest.fixture
def record() -> xr.Dataset:
    values = np.arange(2 * 3 * 2 * 5, dtype=float).reshape(2, 3, 2, 5)
    values[0, :, :, 0] = np.nan
    values[:, 1, 1, :] = np.nan
    values[:, 0, 0, 3] = np.nan
    coords = {"layer": [2, 5, 9], "head": [0, 1], "query": [10, 11, 12, 13, 14]}
    return xr.Dataset({"entropy": (("example", "layer", "head", "query"), values)}, coords=coords)


@pytest.fixture
def results() -> pd.DataFrame:
    rows = [
        ("needle", "no edit", "baseline", 0.9, 0.85, 0.95, 0.0, 0.0, 0.0, 40),
        ("needle", "top 10", "intervention", 0.3, 0.2, 0.4, -0.6, -0.7, -0.5, 40),
    ]
    rows += [("needle", f"random (seed {k})", "control", 0.8, 0.7, 0.9, -0.1, -0.2, 0.0, 40) for k in range(3)]
    return pd.DataFrame(rows, columns="task condition kind mean ci_low ci_high delta delta_low delta_high n".split())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the", "the"),
        (" the", "·the"),
        ("Ġthe", "·the"),
        ("▁the", "·the"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("", "∅"),
        ("<s>", "&lt;s&gt;"),
        ("&lt;", "&amp;lt;"),
        ("\"'", "&#34;&#39;"),
        ("$$", "&#36;&#36;"),
        ("\u202e\x00", "\\u202e\\x00"),
        ("\udc80", "\\udc80"),
        ("猫é�", "猫é�"),
        ("a" * 12 + "b" * 1_000_000 + "c" * 12, "a" * 12 + "bbb…" + "c" * 8),
    ],
)
def test_show_token(text: str, shown: str) -> None:
    assert plots.show_token(text) == shown


def test_show_token_never_cuts_an_entity() -> None:
    shown = plots.show_token("<" * 100)
    assert shown.replace("&lt;", "") == "…" and shown.count("&lt;") == 23


def test_no_text_reaches_plotly_unescaped(scores, record, results) -> None:
    results["condition"] = ATTACK + results["condition"]
    results["task"] = ATTACK
    name = HeadScores(ATTACK, scores.trials[:, :3, :2])
    figures = [
        plots.head_map(np.eye(3), title=ATTACK, label=ATTACK),
        plots.ranked(name),
        plots.pattern(np.eye(2), [ATTACK, "a"], [ATTACK, "\n"], title=ATTACK),
        plots.evaluation(results),
        plots.statistic_map(record.rename(entropy=ATTACK), ATTACK),
        plots.statistic_profile(record.rename(entropy=ATTACK), ATTACK, 2, 0),
    ]
    for fig in figures:
        text = everything(fig)
        assert "<img" not in text.lower() and "&lt;img" in text.lower()


def test_head_map_shows_scores_with_interval_and_count(scores) -> None:
    fig = plots.head_map(scores, title="Retrieval", label="Score")
    heat, crosses = fig.data
    np.testing.assert_array_equal(heat.z, scores.mean.T)
    low, high = scores.interval
    assert heat.text[1, 2] == f"<br>interval [{low[2, 1]:.3g}, {high[2, 1]:.3g}]<br>n = 12"
    assert heat.customdata[1, 2] == "Layer 2, head 1"
    assert (heat.zmin, heat.zmax) == (0.0, np.nanmax(scores.mean))
    assert (crosses.x.tolist(), crosses.y.tolist()) == ([3], [2])
    assert fig.layout.template == style.TEMPLATE


def test_head_map_of_differences_is_centred_at_zero() -> None:
    fig = plots.head_map(np.array([[-0.5, 0.1], [0.2, np.nan]]), title="d", label="d", diverging=True)
    assert (fig.data[0].zmin, fig.data[0].zmax) == (-0.5, 0.5)
    assert "%{text}" in fig.data[0].hovertemplate and fig.data[0].text[0, 0] == ""


def test_head_map_refuses_what_it_cannot_draw() -> None:
    for values in (np.empty((0, 4)), np.full((2, 2), np.nan), np.zeros(3)):
        with pytest.raises(HeadscopeError):
            plots.head_map(values, title="t", label="s")
    with pytest.raises(HeadscopeError, match=r"low has shape \(3, 2\)"):
        plots.head_map(np.eye(2), title="t", label="s", low=np.zeros((3, 2)), high=np.ones((2, 2)))
    with pytest.raises(HeadscopeError, match="both ends"):
        plots.head_map(np.eye(2), title="t", label="s", low=np.zeros((2, 2)))


def test_ranked_puts_the_best_head_on_top_with_its_interval(scores) -> None:
    fig = plots.ranked(scores, k=3)
    bars, dots = fig.data
    assert list(labels(fig.layout.yaxis).values())[:2] == ["L2H1", "L0H0"]
    assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
    np.testing.assert_allclose(dots.x[0], scores.mean[2, 1])
    low, high = scores.interval
    assert bars.x[:3] == (low[2, 1], high[2, 1], None)
    assert len(plots.ranked(scores, k=99).data[1].x) == 11  # the head without trials has no rank
    with pytest.raises(HeadscopeError, match="k=0"):
        plots.ranked(scores, k=0)


def test_ranked_without_intervals_draws_dots_only() -> None:
    fig = plots.ranked(HeadScores("sinks", np.eye(3)[None]))
    assert len(fig.data[0].x) == 0 and "interval none" in fig.data[1].text[0]


def test_needle_grid_averages_trials_and_counts_them() -> None:
    rows = [(512, 0, 1.0), (512, 0, 0.0), (512, 0, np.nan), (512, 50, 1.0), (1024, 0, 0.0), (1024, 50, np.nan)]
    fig = plots.needle_grid(pd.DataFrame(rows, columns=["length", "depth", "score"]))
    heat, crosses = fig.data
    np.testing.assert_array_equal(heat.z, [[0.5, 0.0], [1.0, np.nan]])
    np.testing.assert_array_equal(heat.customdata, [[2, 1], [1, 0]])
    assert labels(fig.layout.xaxis) == {0: "512", 1: "1,024"} and labels(fig.layout.yaxis) == {0: "0%", 1: "50%"}
    assert (crosses.x.tolist(), crosses.y.tolist()) == ([1], [1]) and crosses.text == (
        "1,024 tokens, depth 50%: not run",
    )
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_needle_grid_refuses_bad_frames() -> None:
    frame = pd.DataFrame({"length": [1.0], "depth": [0.0], "score": [0.5]})
    for bad, message in (
        (frame.drop(columns="depth"), "missing: depth"),
        (frame.head(0), "no rows"),
        (frame.assign(score=np.nan), "NaN"),
        (frame.assign(score=50.0), "between 0 and 1"),
    ):
        with pytest.raises(HeadscopeError, match=message):
            plots.needle_grid(bad)


def test_pattern_keeps_repeated_tokens_apart_and_the_future_blank() -> None:
    weights = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.2, 0.3, 0.5]])
    fig = plots.pattern(weights, ["a", "a", "<s>"], ["a", "a", "<s>"], title="L0H0", log=False)
    heat = fig.data[0]
    np.testing.assert_array_equal(heat.x, [0, 1, 2])
    assert labels(fig.layout.xaxis) == {0: "a", 1: "a", 2: "&lt;s&gt;"}
    np.testing.assert_array_equal(np.isnan(heat.z), np.triu(np.ones((3, 3), bool), 1))
    np.testing.assert_array_equal(heat.z[np.tril_indices(3)], weights[np.tril_indices(3)])
    assert heat.text[2][1] == "<b>0.3000</b><br>query 2: &lt;s&gt;<br>key 1: a" and heat.text[0][1] == ""
    assert weights[0, 1] == 0.0  # the caller's array is untouched


def test_pattern_of_the_last_queries_and_of_a_tile() -> None:
    fig = plots.pattern(np.array([[0.4, 0.6, 0.0], [0.2, 0.2, 0.6]]), ["b", "c"], list("abc"), title="")
    np.testing.assert_array_equal(fig.data[0].y, [1, 2])
    tile = plots.pattern(np.full((2, 2), 0.1), ["y", "z"], ["a", "b"], title="", query_offset=50, key_offset=7)
    np.testing.assert_array_equal(tile.data[0].y, [50, 51])
    np.testing.assert_array_equal(tile.data[0].x, [7, 8])
    assert not np.isnan(tile.data[0].z).any()


def test_pattern_on_logarithmic_colours() -> None:
    heat = plots.pattern(np.array([[1.0, 0.0], [0.99, 0.01]]), ["a", "b"], ["a", "b"], title="", log=True).data[0]
    np.testing.assert_allclose(heat.z[1], [np.log10(0.99), -2.0])
    assert (heat.zmin, heat.zmax) == (-4, 0) and "<b>0.0100</b>" in heat.text[1][1]


def test_pattern_refuses_what_it_would_show_wrongly() -> None:
    two = ["a", "b"]
    with pytest.raises(HeadscopeError, match="causal=False"):
        plots.pattern(np.full((2, 2), 0.5), two, two, title="")
    assert not np.isnan(plots.pattern(np.full((2, 2), 0.5), two, two, title="", causal=False).data[0].z).any()
    for weights, tokens, message in (
        (np.eye(3), two, "shape"),
        (np.empty((0, 0)), [], "no weights"),
        (np.eye(300), ["a"] * 300, "too large"),
    ):
        with pytest.raises(HeadscopeError, match=message):
            plots.pattern(weights, tokens, tokens, title="")


def test_evaluation_groups_controls_and_shows_differences(results) -> None:
    fig = plots.evaluation(results)
    assert list(fig.layout.yaxis.ticktext) == ["no edit", "top 10", "random (×3)"]
    dots = [trace for trace in fig.data if trace.mode == "markers" and trace.x[0] is not None]
    means = {trace.marker.color: list(trace.x) for trace in dots if trace.xaxis == "x"}
    assert means == {style.INK: [0.9], style.CONTRAST: [0.3], style.MUTED: [0.8, 0.8, 0.8]}
    deltas = {trace.marker.color: list(trace.x) for trace in dots if trace.xaxis == "x2"}
    assert deltas == {style.CONTRAST: [-0.6], style.MUTED: [-0.1, -0.1, -0.1]}
    controls = next(trace for trace in dots if trace.marker.color == style.MUTED)
    assert len(set(controls.y)) == 3 and all(abs(y - 2) < 0.5 for y in controls.y)
    bars = next(trace for trace in fig.data if trace.mode == "lines" and trace.line.color == style.CONTRAST)
    assert bars.x[:2] == (0.2, 0.4)
    low, high = fig.layout.xaxis.range
    assert low < 0.2 and high > 0.95
    assert [trace.name for trace in fig.data if trace.name] == ["Baseline", "Intervention", "Control"]


def test_evaluation_without_differences_and_with_several_tasks(results) -> None:
    results = pd.concat([results, results.assign(task="copy")])
    fig = plots.evaluation(results.assign(delta=np.nan))
    assert {trace.xaxis for trace in fig.data} == {"x", "x2"}  # one panel a task
    assert [note.text for note in fig.layout.annotations] == ["<b>needle</b>", "<b>copy</b>"]


def test_evaluation_refuses_bad_frames(results) -> None:
    for bad, message in (
        (results.drop(columns="delta"), "missing: delta"),
        (results.head(0), "no rows"),
        (results.assign(kind="other"), "'other'"),
        (results.assign(mean=np.nan), "NaN"),
    ):
        with pytest.raises(HeadscopeError, match=message):
            plots.evaluation(bad)


def test_statistic_map_reduces_over_examples_and_queries(record) -> None:
    fig = plots.statistic_map(record, "entropy")
    expected = record["entropy"].mean(("example", "query")).to_numpy().T
    np.testing.assert_allclose(fig.data[0].z, expected)
    assert np.isnan(expected[1, 1]) and labels(fig.layout.xaxis) == {0: "2", 1: "5", 2: "9"}
    assert fig.data[0].text[0, 0] == "<br>n = 7" and fig.data[0].customdata[1, 2] == "Layer 9, head 1"
    assert plots.statistic_map(record, "entropy", "max").data[0].z[1, 2] == 59.0
    shuffled = plots.statistic_map(record.transpose("query", "head", "layer", "example"), "entropy")
    np.testing.assert_allclose(shuffled.data[0].z, expected)


def test_statistic_profile_shows_mean_and_band(record) -> None:
    fig = plots.statistic_profile(record, "entropy", 2, 0)
    line = fig.data[-1]
    np.testing.assert_array_equal(line.x, [10, 11, 12, 13, 14])
    np.testing.assert_allclose(line.y, [30, 16, 17, np.nan, 19])
    np.testing.assert_array_equal(line.customdata, [1, 2, 2, 0, 2])
    first, second = fig.data[:-1]  # the band does not bridge the gap at 13
    np.testing.assert_array_equal(first.x, [10, 11, 12, 12, 11, 10])
    np.testing.assert_allclose(first.y, [30, 4, 5, 29, 28, 30])
    np.testing.assert_array_equal(second.x, [14, 14])
    single = plots.statistic_profile(record.isel(example=[1]), "entropy", 2, 0)
    assert len(single.data) == 1 and single.layout.title.subtitle.text == "one example"


def blocks(values: np.ndarray, size: int = 4) -> xr.Dataset:
    """A record of one head's map."""
    dims = ("example", "layer", "head", "query_block", "key_block")
    coords = {"example": [0], "layer": [3], "head": [1]}
    return xr.Dataset({"block_map": (dims, values[None, None, None], {"block": size})}, coords)


def test_block_map_shows_tokens_and_leaves_the_future_blank() -> None:
    values = np.array([[1.0, 0.0, np.nan], [0.25, 0.75, np.nan], [np.nan] * 3])
    fig = plots.block_map(blocks(values), 3, 1)
    heat = fig.data[0]
    np.testing.assert_allclose(heat.customdata, [[1.0, np.nan], [0.25, 0.75]])
    np.testing.assert_allclose(heat.z[1], np.log10([0.25, 0.75]))
    assert list(heat.x) == list(heat.y) == [1.5, 5.5]
    assert heat.text[1][0] == "queries 4 to 7<br>keys 0 to 3"
    sums = plots.block_map(blocks(np.array([[4.0, 0.0], [1.0, 3.0]])), 3, 1).data[0]
    np.testing.assert_allclose(sums.z, [[4.0, np.nan], [1.0, 3.0]])


def test_block_map_refuses_what_it_cannot_draw(record) -> None:
    with pytest.raises(HeadscopeError, match="block_map"):
        plots.block_map(record, 0, 0)
    with pytest.raises(HeadscopeError, match="no head 0"):
        plots.block_map(blocks(np.ones((1, 1))), 3, 0)
    with pytest.raises(HeadscopeError, match="larger blocks"):
        plots.block_map(blocks(np.ones((1025, 1025))), 3, 1)


def test_statistics_refuse_what_the_record_does_not_hold(record) -> None:
    wide = record.assign(top_keys=record["entropy"].expand_dims(rank=2))
    for call, message in (
        (lambda: plots.statistic_map(record, "sink"), "it has: entropy"),
        (lambda: plots.statistic_map(record, "entropy", "mode"), "unknown reduction"),
        (lambda: plots.statistic_map(wide, "top_keys"), "rank"),
        (lambda: plots.statistic_map(record * np.nan, "entropy"), "NaN everywhere"),
        (lambda: plots.statistic_map(record.isel(example=[]), "entropy"), "no values"),
        (lambda: plots.statistic_profile(record, "entropy", 3, 0), "no layer 3"),
        (lambda: plots.statistic_profile(record, "entropy", 5, 1), "NaN everywhere"),
        (lambda: plots.statistic_profile(record.isel(query=0, drop=True), "entropy", 2, 0), "no query"),
    ):
        with pytest.raises(HeadscopeError, match=message):
            call()


def test_a_pattern_shows_what_lies_beside_a_sink_and_can_be_switched() -> None:
    """0.01 beside a sink of 0.99 has half the colours of the logarithm; the menu holds both pictures."""
    weights = np.array([[1.0, 0.0], [0.99, 0.01]])
    fig = plots.pattern(weights, ["a", "b"], ["a", "b"], title="")
    heat, (menu,) = fig.data[0], fig.layout.updatemenus
    assert (heat.z[1, 1] - heat.zmin) / (heat.zmax - heat.zmin) == pytest.approx(0.5)
    assert [button.label for button in menu.buttons] == ["log colours", "linear colours"] and menu.active == 0
    shown = [button.args[0] for button in menu.buttons]
    assert shown[0]["z"][0][1] == pytest.approx([np.log10(0.99), -2.0], abs=1e-6) and shown[0]["zmin"] == [-4]
    assert shown[1]["z"][0] == [[1.0, None], [0.99, 0.01]] and (shown[1]["zmin"], shown[1]["zmax"]) == ([0.0], [1.0])


def test_differences_are_centred_at_zero() -> None:
    """Of patterns, of head scores and of statistics: as far below 0 as above, and no logarithm."""
    difference = np.array([[0.0, 0.0], [-0.3, 0.1]])
    heat = plots.pattern(difference, ["a", "b"], ["a", "b"], title="").data[0]
    assert (heat.zmin, heat.zmax) == (-0.3, 0.3) and heat.z[1, 0] == -0.3 and heat.colorscale[0][1] == "rgb(5,48,97)"
    heat = plots.head_map(np.array([[1.0, -4.0]]), title="", label="").data[0]
    assert (heat.zmin, heat.zmax) == (-4.0, 4.0)
    assert plots.head_map(np.array([[1.0, 4.0]]), title="", label="").data[0].zmin == 0.0
    values = xr.Dataset({"gap": (("layer", "head"), np.array([[0.5, -0.25]]))}, {"layer": [0], "head": [0, 1]})
    heat = plots.statistic_map(values.expand_dims(example=[0]), "gap").data[0]
    assert (heat.zmin, heat.zmax) == (-0.5, 0.5)


def test_axes_have_units(record) -> None:
    assert plots.statistic_map(record, "entropy").data[0].colorbar.title.text == "Mean entropy (nats)"
    assert plots.statistic_profile(record, "entropy", 2, 1).layout.yaxis.title.text == "Entropy (nats)"
    rows = {
        "task": "t",
        "condition": ["no edit", "x"],
        "kind": ["baseline", "intervention"],
        "mean": [1.0, 2.0],
        "n": 3,
    }
    bounds = dict.fromkeys(("ci_low", "ci_high", "delta", "delta_low", "delta_high"), 0.5)
    fig = plots.evaluation(pd.DataFrame({**rows, **bounds}), {"t": "nats per token"})
    assert fig.layout.xaxis.title.text == "Mean (nats per token)"
    assert fig.layout.xaxis2.title.text == "Difference to baseline (nats per token)"


def test_large_maps_are_drawn_to_one_part_in_a_hundred_thousand() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 64)) * 10.0 ** rng.integers(-3, 4, (64, 64))
    values[3, 5] = np.nan
    drawn = style.drawn(values)
    assert drawn.dtype == np.float32 and np.isnan(drawn[3, 5])
    assert np.nanmax(np.abs(drawn / values - 1)) < 2.0**-17 + 2.0**-24  # half of the last bit that stays
    assert not (drawn.view(np.uint32)[np.isfinite(drawn)] & 0x7F).any()
    assert style.drawn(values[:2]) is not drawn and np.array_equal(style.drawn(values[:2]), values[:2], equal_nan=True)


def test_the_best_heads_interval_ends_inside_the_frame(scores) -> None:
    fig = plots.ranked(scores, k=3)
    assert fig.layout.xaxis.range[0] <= 0 and fig.layout.xaxis.range[1] > scores.interval[1][2, 1]


def test_labels_keep_apart_at_64_layers_of_64_heads() -> None:
    fig = plots.head_map(np.random.default_rng(0).uniform(size=(64, 64)), title="t", label="score")
    cell = fig.layout.height / 64
    layers, heads = fig.layout.xaxis.tickvals, fig.layout.yaxis.tickvals
    assert len(layers) <= 32 and (heads[1] - heads[0]) * cell > 20  # pixels: two digits side by side, 12 high
