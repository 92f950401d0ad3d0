"""Spans, WAAD, FAI and their rhythm against loops over eager weights in float64, and where they are known.

Tolerance: sums of up to 24 float32 weights times distances of up to 24; weights are off by 1e-6 (eps times scores of
about 10), two layers deep: 1e-3 for distances, 1e-5 for masses.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import xarray as xr

from headscope.interp import heads, trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.anchors.responses import future_attention, future_statistics, groups
from headscope.interp.heads.anchors.rhythm import anchors, peaks, rhythm
from headscope.interp.heads.discovery import discover
from headscope.interp.statistics import Distance, WindowedDistance

DISTANCE, MASS = 1e-3, 1e-5
QUIET = {"progress": False}


def span(pattern: np.ndarray, prompt: int, window: int = 10**9) -> np.ndarray:
    """Mean over response rows of sum_s A[t, s] min(t - s, window): (..., ) of (..., query, key)."""
    n = pattern.shape[-1]
    rows = [sum(pattern[..., t, s] * min(t - s, window) for s in range(t + 1)) for t in range(prompt, n)]
    return np.stack(rows, -1)


def fai(pattern: np.ndarray, prompt: int, lowest: int, highest: int | None) -> np.ndarray:
    n = pattern.shape[-1]
    found = []
    for s in range(prompt, n):
        last = n - 1 if highest is None else min(n - 1, s + highest)
        rows = [pattern[..., t, s] for t in range(s + lowest, last + 1)]
        found.append(np.mean(rows, axis=0) if rows else np.full(pattern.shape[:-2], np.nan))
    return np.stack(found, -1)


def test_spans_are_those_of_eager_weights(grouped, texts, eager, ids_of) -> None:
    pattern = eager(grouped, ids_of(grouped, texts, 24))
    options = dict(texts=texts, length=24, prompt=6, batch=3, **QUIET)
    found = heads.head_span(grouped, **options)
    np.testing.assert_allclose(found.trials, span(pattern, 6).mean(-1), rtol=0, atol=DISTANCE)
    windowed = heads.waad(grouped, window=4, **options)
    np.testing.assert_allclose(windowed.trials, span(pattern, 6, 4).mean(-1), rtol=0, atol=DISTANCE)
    assert (windowed.trials < found.trials - 1).any()


@pytest.mark.parametrize("horizon", [(0, None), (3, None), (3, 7), (5, 5), (0, 40)])
def test_future_attention_is_that_of_eager_weights(grouped, texts, eager, ids_of, horizon) -> None:
    want = fai(eager(grouped, ids_of(grouped, texts, 24)), 6, *horizon)
    options = dict(zip(("lowest", "highest"), horizon, strict=True))
    found = heads.fai(grouped, texts=texts, length=24, prompt=6, batch=3, **options, **QUIET)
    np.testing.assert_allclose(found.trials, np.nanmean(want, -1), rtol=0, atol=MASS)
    assert (
        abs(np.nanmean(want, -1) - np.nanmean(fai(eager(grouped, ids_of(grouped, texts, 24)), 6, 8, 9), -1)).max()
        > 1e-3
    )


def test_padding_on_either_side_changes_nothing(grouped, padded, eager) -> None:
    ids, mask, at = padded
    with trace(grouped, [Distance(), WindowedDistance(4), *future_statistics(2, None)]) as tracer:
        grouped.model(ids, attention_mask=mask)
    for e, place in enumerate(at):
        pattern = eager(grouped, ids[e : e + 1, place])
        n = pattern.shape[-1]
        record = tracer.record.isel(example=[e], query=slice(0, n), key=slice(0, n))
        np.testing.assert_allclose(record["distance"].to_numpy(), span(pattern, 0), rtol=0, atol=DISTANCE)
        np.testing.assert_allclose(record["windowed_distance"].to_numpy(), span(pattern, 0, 4), rtol=0, atol=DISTANCE)
        np.testing.assert_allclose(future_attention(record, 3, 2, None), fai(pattern, 3, 2, None), rtol=0, atol=MASS)


def test_uniform_attention_has_known_spans(grouped, texts) -> None:
    """A row t over t + 1 keys looks t / 2 back, and gives each of them 1 / (t + 1)."""
    with torch.no_grad():
        for layer in grouped.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    options = dict(texts=texts, length=6, prompt=3, **QUIET)
    np.testing.assert_allclose(heads.head_span(grouped, **options).mean, 2.0, rtol=1e-5)  # 1.5, 2, 2.5
    expected = np.mean([5 / 4, 7 / 5, 9 / 6])  # within 2: 0 + 1 + 2 + 2 ... over 4, 5 and 6 keys
    np.testing.assert_allclose(heads.waad(grouped, window=2, **options).mean, expected, rtol=1e-5)
    received = np.mean([(1 / 5 + 1 / 6) / 2, 1 / 6])
    np.testing.assert_allclose(heads.fai(grouped, lowest=1, **options).mean, received, rtol=1e-5)


def test_groups_are_thirty_in_a_hundred_in_model_order() -> None:
    spans = np.array([[5.0, 1.0, 1.0, 9.0, 9.0], [9.0, 1.0, 1.0, 4.0, np.nan]])
    local, far = groups(spans)
    assert np.argwhere(local).tolist() == [[0, 1], [0, 2]] and np.argwhere(far).tolist() == [[0, 3], [0, 4]]  # of nine
    assert groups(np.arange(100.0)[:, None], 0.29)[0].sum() == 29  # int(0.29 * 100) is 28
    with pytest.raises(HeadscopeError, match="at most half"):
        groups(spans, 0.6)


def test_the_rhythm_of_a_response(grouped, texts, eager, ids_of) -> None:
    ids = ids_of(grouped, texts[:1], 24)
    found = rhythm(grouped, ids[0].tolist(), 6, window=4, lowest=3, share=0.25)
    pattern = eager(grouped, ids)[0]
    spans = span(pattern, 6).mean(-1)
    order = np.argsort(spans.ravel())
    local, far = (pattern.reshape(8, 24, 24)[chosen].mean(0) for chosen in (order[:2], order[-2:]))
    np.testing.assert_allclose(found["waad"], span(local, 6, 4), rtol=0, atol=DISTANCE)
    np.testing.assert_allclose(found["fai"], fai(far, 6, 3, None), rtol=0, atol=MASS)
    assert np.isnan(found["fai"]).sum() == 3 and found["token"].to_numpy().tolist() == list(range(6, 24))
    with torch.no_grad():
        p = copy.deepcopy(grouped.model).double()(ids).logits[0].softmax(-1)
    np.testing.assert_allclose(found["entropy"], -(p * p.log()).sum(-1)[5:-1], rtol=0, atol=1e-4)


def test_peaks_that_go_together() -> None:
    """Ten tokens, the last without FAI: WAAD peaks at 2 and 6, FAI at 3 and 8; 3 follows a peak, 8 does not."""
    waad, future, entropy = np.zeros(10), np.zeros(10), np.arange(10.0)
    waad[[2, 6]], future[[3, 8]], future[9] = 5.0, 1.0, np.nan
    found = xr.Dataset({"waad": ("token", waad), "fai": ("token", future), "entropy": ("token", entropy)})
    told = anchors(found, share=0.25)
    assert told == {
        "coupling": 0.5,
        "coupling_at_random": 4 / 9,  # 2, 3, 6 and 7 of nine
        "entropy_at_peaks": 4.0,
        "entropy_at_random": 4.5,
    }
    assert anchors(found, share=0.25, within=2)["coupling"] == 1.0
    assert np.flatnonzero(peaks(np.array([1.0, 2.0, 2.0, np.nan]), 0.4)).tolist() == [1]


def test_three_measures_share_a_pass(grouped, texts) -> None:
    methods = [heads.METHODS[name](texts=texts, length=24, prompt=6) for name in ("head_span", "waad", "fai")]
    discover(methods[:1], grouped, progress=False)  # the first trace of a model verifies it, in passes of its own
    passes: list[int] = []
    hook = grouped.model.register_forward_hook(lambda module, args, output: passes.append(1))
    found = discover(methods, grouped, progress=False)
    hook.remove()
    assert len(passes) == 2 and len(found) == 3  # eight texts, five at a time


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("head_span", {"prompt": 256}, "leave tokens for a response"),
        ("waad", {"window": 0}, "1 token or more"),
        ("fai", {"lowest": 8, "highest": 7}, "0 <= lowest <= highest"),
        ("fai", {"lowest": 192}, "of 192 response tokens none has a row 192 later"),
    ],
)
def test_bad_input(grouped, name: str, settings: dict, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        heads.method(name)(grouped, **settings, **QUIET)


def test_a_rhythm_needs_a_response(grouped) -> None:
    with pytest.raises(HeadscopeError, match="at least one is the prompt's"):
        rhythm(grouped, [1, 2, 3], 3)
    with pytest.raises(HeadscopeError, match="no token of this response has an FAI"):
        anchors(rhythm(grouped, [1, 2, 3, 4], 1))


@pytest.mark.slow
def test_smollm2_has_local_and_global_heads(smollm2) -> None:
    options = dict(samples=2, length=128, prompt=32)
    names = ("head_span", "waad", "fai")
    found = discover([heads.METHODS[name](**options) for name in names], smollm2, progress=False)
    by = dict(zip(names, found, strict=True))
    local, far = groups(by["head_span"].mean)
    assert local.sum() == far.sum() == 81
    assert by["waad"].mean[local].mean() < by["waad"].mean[far].mean()
    prompt = smollm2.encode("The capital of France is Paris. The capital of Italy is")["input_ids"][0].tolist()
    new = smollm2.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
    told = anchors(rhythm(smollm2, new, len(prompt), lowest=1))
    print(told)
    assert 0 <= told["coupling"] <= 1 and told["entropy_at_random"] > 0
