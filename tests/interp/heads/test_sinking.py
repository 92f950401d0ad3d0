"""Sinks and what makes them: against the untouched model in float64, and in models whose streams are known.

Tolerance: float32 against float64 through two layers whose scores reach about 10: eps (1.2e-7) times 10, a few times
over in each layer, 1e-5 of a weight; of a norm or a logit, 1e-5 of its size, which is about 10: 1e-4.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headscope.interp import heads, trace
from headscope.interp.attention.call import AttentionCall, Mask
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import discover
from headscope.interp.heads.sinking.dimensions import _dimensions, sink_dimensions, threshold
from headscope.interp.statistics import KeyNorm, LogitParts, ValueNorm
from headscope.kernels.request import Reduced

WEIGHT, NEAR = 1e-5, 1e-4
QUIET = {"progress": False}
STREAM = ("sink_hidden_norm", "massive_activations", "sink_dimension")


def dense(lm, ids, **inputs):
    """The untouched model's q, k, v (example, layer, head, position, width), keys and values of every query head."""
    model = copy.deepcopy(lm.model).double()
    queries: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        cache = model(ids, use_cache=True, **inputs).past_key_values
        turn = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(ids.shape[1])[None])
    for hook in hooks:
        hook.remove()
    q = [apply_rotary_pos_emb(x.unflatten(-1, (4, 8)).transpose(1, 2), x[:, None, :, :8], *turn)[0] for x in queries]
    k, v = ([getattr(one, name).repeat_interleave(2, 1) for one in cache.layers] for name in ("keys", "values"))
    return tuple(torch.stack(x, 1).numpy() for x in (q, k, v))


def test_norms_are_those_of_the_cache_with_padding_on_either_side(grouped, padded) -> None:
    ids, mask, at = padded
    _, k, v = dense(grouped, ids, attention_mask=mask)
    with trace(grouped, [KeyNorm(), ValueNorm()]) as tracer:
        grouped.model(ids, attention_mask=mask)
    for name, x in (("key_norm", k), ("value_norm", v)):
        for e, place in enumerate(at):
            want = np.linalg.norm(x[e][:, :, place], axis=-1)
            found = tracer.record[name][e].to_numpy()[..., : want.shape[-1]]
            np.testing.assert_allclose(found, want, rtol=0, atol=NEAR)
            assert abs(want[..., 1:] - want[..., :-1]).max() > 100 * NEAR


@pytest.mark.parametrize(("name", "which"), [("sink_key_norm", 1), ("sink_value_norm", 2)])
def test_norm_ratios(grouped, texts, ids_of, name: str, which: int) -> None:
    norms = np.linalg.norm(dense(grouped, ids_of(grouped, texts, 20))[which], axis=-1)
    for key in (0, 3):
        scores = heads.method(name)(grouped, texts=texts, length=20, key=key, batch=3, **QUIET)
        others = (norms.sum(-1) - norms[..., key]) / 19
        np.testing.assert_allclose(scores.trials, norms[..., key] / others, rtol=0, atol=NEAR)
    assert scores.provenance["per"] == "head"


def parts(q, k, scale, visible):
    """The two parts of each query's gap for key 0, pair by pair, from their definition in words."""
    angle, norm = (np.full(q.shape[:-1], np.nan) for _ in range(2))
    length = np.linalg.norm(k, axis=-1)
    for index in np.ndindex(*q.shape[:-1]):
        *lead, i = index
        size, keys, lengths = scale * np.linalg.norm(q[index]), k[tuple(lead)], length[tuple(lead)]
        cosine = keys @ q[index] * scale / (size * lengths)
        others = [j for j in visible(i) if j != 0]
        if others and 0 in visible(i):
            angle[index] = np.mean([size * (cosine[0] - cosine[j]) * (lengths[0] + lengths[j]) / 2 for j in others])
            norm[index] = np.mean([size * (lengths[0] - lengths[j]) * (cosine[0] + cosine[j]) / 2 for j in others])
    return angle, norm


def test_the_parts_of_a_logit_sum_to_what_eager_weights_say(grouped, padded, eager) -> None:
    """log A[i, 0] - log A[i, j] is a difference of logits: nothing of ours is in it."""
    ids, mask, at = padded
    q, k, _ = dense(grouped, ids, attention_mask=mask)
    with trace(grouped, [LogitParts()]) as tracer:
        grouped.model(ids, attention_mask=mask)
    for e, place in enumerate(at):
        n = place.stop - place.start
        found = [tracer.record[f"{part}_gap"][e].to_numpy()[..., :n] for part in ("angle", "norm")]
        want = parts(q[e][:, :, place], k[e][:, :, place], 8**-0.5, lambda i: range(i + 1))
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=NEAR)
        log = np.log(np.maximum(eager(grouped, ids[e : e + 1, place])[0], 1e-300))
        for i in range(1, n):
            gap = log[:, :, i, 0] - log[:, :, i, 1 : i + 1].mean(-1)
            np.testing.assert_allclose(found[0][..., i] + found[1][..., i], gap, rtol=0, atol=NEAR)
        assert np.isnan(found[0][..., 0]).all() and abs(found[0][..., 1:]).max() > 0.1


def call_of(keys: list[list[float]], query: list[float], window: int | None = None) -> AttentionCall:
    k = torch.tensor(keys)[None, None]
    q = torch.tensor([query] * len(keys))[None, None]
    return AttentionCall(q, k, k, Mask.causal(window=window), 0.5, 0, "layers.*")


def test_parts_of_known_vectors() -> None:
    """Scale 0.5, a query of length 2: score = |k| cos."""

    def last(keys: list[list[float]], **options: int) -> tuple[float, float]:
        found = LogitParts().measure(call_of(keys, [2.0, 0.0], **options), Reduced(), None)
        return float(found["angle_gap"][0, 0, -1]), float(found["norm_gap"][0, 0, -1])

    assert last([[1.0, 0.0], [0.0, 1.0]]) == (1.0, 0.0)  # of one length: all of it is the angle
    assert last([[1.0, 0.0], [3.0, 0.0]]) == (0.0, -2.0)  # in one direction: all of it is the length
    assert last([[1.0, 0.0], [0.0, 3.0]]) == (2.0, -1.0)  # a short key at a good angle: 1 - 0, as 2 - 1
    assert np.isnan(last([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], window=2)).all()  # key 0 is out of the last one's sight


def test_sink_angle(grouped, texts, ids_of) -> None:
    q, k, _ = dense(grouped, ids_of(grouped, texts[:3], 12))
    want = [np.nanmean(part[..., 1:], -1) for part in parts(q, k, 8**-0.5, lambda i: range(i + 1))]
    for part, expected in zip(("angle", "norm"), want, strict=True):
        scores = heads.sink_angle(grouped, texts=texts[:3], length=12, part=part, batch=2, **QUIET)
        np.testing.assert_allclose(scores.trials, expected, rtol=0, atol=NEAR)
        assert scores.provenance["gap_nats"] == pytest.approx(
            {"angle": want[0].mean(), "norm": want[1].mean()}, abs=NEAR
        )


def test_hidden_sinks_are_those_of_eager_attention(grouped, texts, eager, ids_of) -> None:
    pattern, limit = eager(grouped, ids_of(grouped, texts, 20)), 0.12
    scores = heads.hidden_sinks(grouped, texts=texts, length=20, threshold=limit, batch=3, **QUIET)
    want, count = np.zeros(pattern.shape[:3]), []
    for place in np.ndindex(*pattern.shape[:3]):
        mean = [pattern[place][:, j].sum() / (20 - j) for j in range(20)]
        assert min(abs(m - limit) for m in mean) > WEIGHT  # rounding decides nothing
        hidden = [j for j in range(20) if mean[j] > limit][1:]
        want[place] = pattern[place][:, hidden].sum(-1).mean()
        count.append(len(hidden))
    np.testing.assert_allclose(scores.trials, want, rtol=0, atol=20 * WEIGHT)
    assert scores.provenance["hidden_sinks"] == pytest.approx(np.mean(count)) and 0 < want.mean() < 0.9


def test_uniform_attention_has_known_hidden_sinks(grouped, texts) -> None:
    """A[i, j] = 1 / (i + 1) over 4 tokens: m = (.52, .36, .29, .25), all above 0.2, of which the first is spared."""
    with torch.no_grad():
        for layer in grouped.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    scores = heads.hidden_sinks(grouped, texts=texts[:1], length=4, threshold=0.2, **QUIET)
    np.testing.assert_allclose(scores.mean, (3 - 1 - 1 / 2 - 1 / 3 + 1 - 1 / 4) / 4, atol=WEIGHT)
    assert scores.provenance["hidden_sinks"] == 3


@pytest.fixture
def known_stream(make_grouped):
    """A model of five layers that add nothing: its stream is the embedding, 1 or -1 everywhere but at BOS."""
    lm = make_grouped(layers=5)
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        weight = lm.model.model.embed_tokens.weight
        weight.copy_(weight.sign())
        weight[60] = 1.0
        weight[60, 7] = -2000.0
    return lm


def test_a_known_stream(known_stream, texts) -> None:
    options = dict(texts=texts[:3], length=10, **QUIET)
    at_bos = np.sqrt(31 + 2000.0**2)
    scores = heads.sink_hidden_norm(known_stream, **options)
    np.testing.assert_allclose(scores.trials, at_bos / np.sqrt(32), rtol=1e-6)
    assert scores.provenance["per"] == "layer" and scores.trials.shape == (3, 5, 4)
    scores = heads.massive_activations(known_stream, **options)
    np.testing.assert_allclose(scores.trials, 2000.0)
    assert scores.provenance["massive"] == [[layer, 0, 7, 3] for layer in range(5)]
    assert scores.details[0]["massive"][2] == [2, 0, 7, -2000.0]
    assert heads.massive_activations(known_stream, times=2001, **options).provenance["massive"] == []
    scores = heads.sink_dimension(known_stream, **options)
    np.testing.assert_allclose(scores.trials, 2000 / (at_bos / np.sqrt(32)), rtol=1e-6)
    assert scores.provenance["dimensions"] == [[layer, 7, 1.0] for layer in range(5)]


def test_stream_methods_are_the_models_own_hidden_states(grouped, texts, ids_of) -> None:
    with torch.no_grad():
        states = grouped.model(ids_of(grouped, texts, 10), output_hidden_states=True).hidden_states
    x = torch.stack(states[:2], 1).double().numpy()  # what enters each layer
    norms = np.linalg.norm(x, axis=-1)
    want = norms[..., 2] / np.delete(norms, 2, -1).mean(-1)
    alone = heads.sink_hidden_norm(grouped, texts=texts, length=10, key=2, **QUIET)
    np.testing.assert_allclose(alone.trials, np.repeat(want[..., None], 4, -1), rtol=1e-5)
    entering = heads.massive_activations(grouped, texts=texts, length=10, place="resid_pre", **QUIET)
    ratio = abs(x).max((2, 3)) / np.median(abs(x), axis=(2, 3))
    np.testing.assert_allclose(entering.trials, np.repeat(ratio[..., None], 4, -1), rtol=1e-5)


def test_methods_of_the_stream_and_of_heads_share_a_pass(grouped, texts) -> None:
    names = (*STREAM, "hidden_sinks", "sink_angle", "sink_key_norm")
    methods = [heads.METHODS[name](texts=texts, length=16) for name in names]
    alone = [discover([method], grouped, progress=False)[0] for method in methods]
    passes: list[int] = []
    hook = grouped.model.register_forward_hook(lambda module, args, output: passes.append(1))
    together = discover(methods, grouped, progress=False)
    hook.remove()
    assert len(passes) == 1
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.trials, other.trials, rtol=1e-5, atol=WEIGHT)  # one pass sums in another order


def test_the_threshold_is_in_the_widest_gap_of_the_largest_twentieth() -> None:
    phi = np.array([1.0, 9.0, *np.linspace(9.1, 10, 36), 20.0, 22.0])  # the gap from 1 to 9 is below the median
    assert threshold(phi) == 15.0
    assert threshold(np.array([*np.linspace(0, 1, 37), 20.0, 21.0, 22.0])) == 20.5  # 3 of 40 above would be too many
    mean = np.zeros((6, 100))
    mean[1:, 4], mean[1:, 8], mean[:, 9], mean[2:4, 5] = 5.0, 4.0, 3.2, 9.0
    assert _dimensions(mean, np.arange(6), 6) == (4, 5)  # 5 passes in two of the three layers 2 to 4, and is largest
    assert _dimensions(np.where(mean > 3.1, 3.0, mean), np.arange(6), 6) == ()


def test_a_model_without_sink_dimensions_has_none(grouped, texts) -> None:
    found = sink_dimensions(grouped, texts, length=16)
    assert found.dimensions == () and found.usable == () and np.isnan(found.tau).all()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sink_key_norm", {"key": 64}, "key=64 is not a position .* choose 0 to 63"),
        ("sink_angle", {"part": "sum"}, "choose 'angle' or 'norm'"),
        ("sink_angle", {"length": 1}, "take 2 tokens or more"),
        ("hidden_sinks", {"threshold": 10}, "choose 0 < threshold < 1"),
        ("massive_activations", {"place": "mlp_out"}, "choose 'resid_pre' or 'resid_post'"),
    ],
)
def test_bad_input(grouped, name: str, settings: dict, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        heads.method(name)(grouped, **settings, **QUIET)


@pytest.mark.slow
def test_smollm2s_sink_is_a_matter_of_angle_in_one_dimension(smollm2) -> None:
    names = ("sinks", "hidden_sinks", "sink_angle", "sink_key_norm", "sink_value_norm", *STREAM)
    found = discover([heads.METHODS[name](samples=6) for name in names], smollm2, progress=False)
    by = dict(zip(names, found, strict=True))
    sinks = by["sinks"].mean > 0.3
    assert sinks.sum() > 50 and np.median(by["sink_angle"].mean[sinks]) > 2  # Gu et al.: the angle makes the sink
    assert np.median(by["sink_value_norm"].mean[sinks]) < 0.8  # and little is written from there
    middle = slice(6, 24)
    assert np.median(by["sink_hidden_norm"].mean[middle]) > 3
    gap = by["sink_angle"].provenance["gap_nats"]
    assert gap["angle"] > abs(gap["norm"])
    dimensions = sink_dimensions(smollm2, samples=8)
    print(dimensions, gap, by["massive_activations"].provenance["massive"][:3])
    assert 1 <= len(dimensions.dimensions) <= 2
    tau = np.array(dimensions.tau)[4:21]
    assert ((tau > 19) & (tau < 22)).mean() > 0.8  # 20.1 to 21.0 was found in layers 4 to 20 of SmolLM2 on other texts
