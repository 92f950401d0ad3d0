"""Position bias, profiles, trends and matched heads against eager weights in float64, and where they are known.

Tolerance: float32 weights are off by about eps (1.2e-7) times scores of about 10, through two layers: 1e-5; products of
two layers' weights and sums over 20 of them, 1e-4. Divergences are in float64, of float32 queries and keys whose scores
are off by 1e-5: 1e-4.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from headscope.interp import heads, load_model, trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.position.matching import head_distances, match_heads
from headscope.interp.heads.position.profile import distance_profile, received_profile
from headscope.interp.heads.position.trend import recency_trend, remove_trend
from headscope.interp.models import LanguageModel
from headscope.interp.statistics import Rollout
from headscope.interp.survey.tiny import tiny_model

NEAR = 1e-4
QUIET = {"progress": False}


def rollout(pattern: np.ndarray, residual: float = 0.0) -> np.ndarray:
    """Each head's A_(t,h) P_(t-1), in full: (layer, head, query, position)."""
    size = pattern.shape[-1]
    before, found = np.eye(size), []
    for layer in pattern:
        here = residual * before + (1 - residual) * layer @ before
        found.append(here)
        before = here.mean(0)
    return np.stack(found)


@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_position_bias_is_the_rollout_of_eager_weights(make_grouped, texts, eager, ids_of, residual: float) -> None:
    lm = make_grouped(layers=4)
    options = dict(texts=texts, length=20, residual=residual, batch=3, **QUIET)
    found = heads.position_bias(lm, parts=3, **options)
    whole = np.stack([rollout(one, residual) for one in eager(lm, ids_of(lm, texts, 20))])
    np.testing.assert_allclose(found.trials, whole[..., -1, 0], rtol=0, atol=NEAR)
    last = whole.mean(axis=(0, 2))[:, -1]  # (layer, position)
    influence = np.stack([last[:, :6].sum(-1), last[:, 6:13].sum(-1), last[:, 13:].sum(-1)], -1)
    np.testing.assert_allclose(found.provenance["influence"], influence, rtol=0, atol=NEAR)
    every = heads.position_bias(lm, parts=20, **options).provenance["influence"]
    np.testing.assert_allclose(every, last, rtol=0, atol=NEAR)
    other = np.stack([rollout(one, 0.5 - residual) for one in eager(lm, ids_of(lm, texts, 20))])
    assert abs(other[..., -1, 0] - whole[..., -1, 0]).max() > 100 * NEAR


def test_uniform_attention_moves_to_the_first_token_layer_by_layer(make_grouped, texts) -> None:
    """The closed case: P_t is the (t + 1)-th power of the matrix with 1 / (i + 1) on and below its diagonal."""
    lm = make_grouped(layers=4)
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    uniform = np.tril(np.ones((12, 12))) / np.arange(1, 13)[:, None]
    want = [np.linalg.matrix_power(uniform, t + 1)[-1, 0] for t in range(4)]
    found = heads.position_bias(lm, texts=texts, length=12, parts=2, **QUIET)
    np.testing.assert_allclose(found.mean, np.repeat(np.array(want)[:, None], 4, 1), rtol=1e-5)
    assert want == sorted(want) and want[-1] > 2 * want[0]


def test_padding_on_either_side_changes_nothing(grouped, padded, eager) -> None:
    ids, mask, at = padded
    with trace(grouped, [Rollout({"first": (0, 1), "some": [(2, 4), (3, 6), (1, 2)]}, residual=0.25)]) as tracer:
        grouped.model(ids, attention_mask=mask)
        grouped.model(ids, attention_mask=mask)  # layer 0 begins anew
    for e, place in enumerate([*at, *at]):
        whole = rollout(eager(grouped, ids[e % 3 : e % 3 + 1, place])[0], 0.25)
        some = slice(*[(2, 4), (3, 6), (1, 2)][e % 3])
        want = np.stack([whole[..., 0], whole[..., some].sum(-1)], -1)
        found = tracer.record["rollout"][e].to_numpy()[:, :, : want.shape[2]]
        np.testing.assert_allclose(found, want, rtol=0, atol=NEAR)


def test_a_rollout_needs_every_layer_and_the_whole_text(grouped) -> None:
    ids = torch.arange(6)[None]
    with pytest.raises(HeadscopeError, match="the layer before 1 of .* was not traced"):
        with trace(grouped, [Rollout()], layers=[1]):
            grouped.model(ids)
    cache = grouped.forward(ids, cache=True).past_key_values
    with pytest.raises(HeadscopeError, match="continues a cache: trace the text in one pass"):
        with trace(grouped, [Rollout()]):
            grouped.forward(ids[:, :1], cache=cache)


def test_a_sliding_window_keeps_the_first_token_out_of_reach() -> None:
    """Two layers with windows of w see 2 (w - 1) back."""
    model = tiny_model("mistral")
    window = model.config.sliding_window
    model.config.max_position_embeddings = 4 * window
    with trace(model, [Rollout({"first": (0, 1)})]) as tracer:
        model(torch.randint(4, 100, (1, 3 * window), generator=torch.Generator().manual_seed(1)), use_cache=False)
    reached = tracer.record["rollout"].isel(example=0, source=0, layer=1).to_numpy().max(0) > 0
    assert reached[: 2 * window - 1].all() and not reached[2 * window - 1 :].any()


def test_distance_profiles_are_those_of_eager_weights(grouped, texts, eager, ids_of) -> None:
    found = distance_profile(grouped, texts, length=20, batch=3)
    assert found["distance"].to_numpy().tolist() == [0, 1, 2, 4, 8, 10]
    pattern = eager(grouped, ids_of(grouped, texts, 20))
    apart = np.arange(20)[:, None] - np.arange(20)[None]
    for bucket, (near, far) in enumerate([(0, 1), (1, 2), (2, 4), (4, 8), (8, 10), (10, 20)]):
        want = (pattern * ((apart >= near) & (apart < far)))[..., 10:, :].sum(-1).mean(-1)
        np.testing.assert_allclose(found[..., bucket], want, rtol=0, atol=NEAR)
    np.testing.assert_allclose(found.sum("distance"), 1.0, rtol=0, atol=NEAR)
    with pytest.raises(HeadscopeError, match="at least 4 tokens"):
        distance_profile(grouped, texts, length=3)


def test_received_profiles_are_those_of_eager_weights(grouped, texts, eager, ids_of) -> None:
    found = received_profile(grouped, texts, keys=(2, 12), length=20, batch=3)
    want = eager(grouped, ids_of(grouped, texts, 20))[..., 12:, 2:12].mean(axis=(0, 3))
    np.testing.assert_allclose(found, want, rtol=0, atol=NEAR)
    with pytest.raises(HeadscopeError, match="at least two positions"):
        received_profile(grouped, texts, keys=(5, 6), length=20)


def test_a_planted_trend_comes_back_and_goes_away() -> None:
    x = np.arange(100) / 99
    mu, sigma = np.array([[0.02], [3.0], [1e-4]]), np.array([[1.249], [-2.5], [12.0]])
    planted = mu * np.exp(sigma * x)
    trend = recency_trend(planted)
    np.testing.assert_allclose(trend.mu, mu[:, 0], rtol=1e-6)
    np.testing.assert_allclose(trend.sigma, sigma[:, 0], atol=1e-6)
    np.testing.assert_allclose(trend(100), planted, rtol=1e-5)
    np.testing.assert_allclose(trend.r2, 1.0)
    np.testing.assert_allclose(trend.weights(100)[0], np.exp(-1.249 * x), rtol=1e-6)  # the form of published weights
    content = np.random.default_rng(0).uniform(0.5, 1.5, (3, 100))
    left = remove_trend(planted * content, recency_trend(planted))
    np.testing.assert_allclose(left, mu * content, rtol=1e-5)


def test_the_trend_is_the_least_squares_one() -> None:
    """No slope and height near the fitted ones does better, on values with noise."""
    x, rng = np.arange(50) / 49, np.random.default_rng(1)
    a = np.exp(0.8 * x) * rng.uniform(0.2, 1.8, 50)
    trend = recency_trend(a)
    rest = ((a - trend(50)) ** 2).sum()
    for d_sigma, d_mu in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (0.5, -0.3)):
        assert ((a - (trend.mu + d_mu) * np.exp((trend.sigma + d_sigma) * x)) ** 2).sum() > rest
    assert trend.r2 == pytest.approx(1 - rest / ((a - a.mean()) ** 2).sum())


def test_what_has_no_trend() -> None:
    spike = np.zeros((2, 30))
    spike[0, -1] = 1.0  # steeper than any exponential; the other is 0
    trend = recency_trend(spike)
    assert np.isnan(trend.sigma).all() and (trend.weights(30) == 1).all()
    for values in ([1.0, 2.0], [1.0, -1.0, 1.0], [1.0, np.nan, 1.0]):
        with pytest.raises(HeadscopeError, match="at least three keys"):
            recency_trend(values)


def divergence(p: np.ndarray, r: np.ndarray, measure: str) -> float:
    """The mean over rows i of a divergence of the weights of the keys up to i, as the analyzer takes them."""
    rows = []
    for i in range(p.shape[0]):
        a, b = p[i, : i + 1], r[i, : i + 1]
        m = (a + b) / 2
        kl = {
            name: float((x * np.log(x / y)).sum())
            for name, x, y in (("ab", a, b), ("ba", b, a), ("am", a, m), ("bm", b, m), ("ma", m, a), ("mb", m, b))
        }
        rows.append(
            {
                "symmetric_kl": kl["ab"] + kl["ba"],
                "js": (kl["am"] + kl["bm"]) / 2,
                "code_jsd": (kl["ma"] + kl["mb"]) / 2,
            }[measure]
        )
    return float(np.mean(rows))


@pytest.mark.parametrize("measure", ["js", "symmetric_kl", "code_jsd"])
def test_head_distances_are_those_of_eager_weights(make_grouped, texts, eager, ids_of, measure: str) -> None:
    one, other = make_grouped(), make_grouped()
    with torch.no_grad():
        for layer in other.model.model.layers:
            layer.self_attn.q_proj.weight.add_(0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5)))
    found = head_distances(one, other, texts[:2], length=10, measure=measure)
    ids = ids_of(one, texts[:2], 10)
    p, r = eager(one, ids), eager(other, ids)
    for e, layer, a, b in np.ndindex(*found.shape):
        want = divergence(p[e, layer, a], r[e, layer, b], measure)
        np.testing.assert_allclose(found[e, layer, a, b], want, rtol=NEAR, atol=NEAR)


def test_shuffled_heads_are_found_again(make_grouped, texts) -> None:
    one, shuffled = make_grouped(), make_grouped()
    order = [3, 2, 0, 1]  # key/value heads change places, and the query heads of the first
    with torch.no_grad():
        for layer in shuffled.model.model.layers:
            attention = layer.self_attn
            for name, kept in (("q_proj", order), ("k_proj", [1, 0]), ("v_proj", [1, 0])):
                weight = getattr(attention, name).weight
                weight.copy_(weight.unflatten(0, (-1, 8))[kept].flatten(0, 1))
            out = attention.o_proj.weight
            out.copy_(out.unflatten(1, (-1, 8))[:, order].flatten(1))
    distances = head_distances(one, shuffled, texts, length=16)
    matched = match_heads(distances)
    assert matched["other"].to_numpy().tolist() == [[2, 3, 1, 0]] * 2  # head 0 is the other's head 2
    assert float(matched["distance"].max()) < 1e-6 < 1e-2 < float(matched["unmatched"].min())
    fewer = match_heads(distances.isel(other=[1, 3]))
    assert sorted(fewer["other"].to_numpy()[0].tolist()) == [-1, -1, 0, 1]
    assert int(np.isnan(fewer["distance"]).sum()) == 4


def test_models_that_cannot_be_compared(make_grouped, texts) -> None:
    one = make_grouped()
    with pytest.raises(HeadscopeError, match="do not have the same layers"):
        head_distances(one, make_grouped(layers=3), texts, length=8)
    tokenizer = copy.deepcopy(one.tokenizer)
    tokenizer.add_tokens(["w1"])
    with pytest.raises(HeadscopeError, match="as different tokens"):
        head_distances(one, load_model(one.model, tokenizer=tokenizer), texts, length=8)
    with pytest.raises(HeadscopeError, match="choose 'js'"):
        head_distances(one, one, texts, measure="kl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"parts": 0}, "into 1 to 128 parts"), ({"residual": 1.0}, "0 <= residual < 1")],
)
def test_bad_input(grouped: LanguageModel, settings: dict, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        heads.position_bias(grouped, **settings, **QUIET)


@pytest.mark.slow
def test_smollm2s_depth_favours_the_first_token(smollm2) -> None:
    plain = heads.position_bias(smollm2, samples=2, length=64, parts=4, **QUIET)
    kept = heads.position_bias(smollm2, samples=2, length=64, parts=4, residual=0.5, **QUIET)
    layers = plain.mean.mean(axis=1)
    assert layers[-1] > 0.9 > layers[0] and layers[-1] > kept.mean.mean(axis=1)[-1]
    influence = np.array(plain.provenance["influence"])
    np.testing.assert_allclose(influence.sum(-1), 1.0, atol=1e-4)
    assert influence[-1, 0] > 0.9
    profile = distance_profile(smollm2, samples=2, length=128)
    np.testing.assert_allclose(profile.sum("distance"), 1.0, atol=1e-4)
    received = received_profile(smollm2, keys=(4, 96), length=128, samples=4)
    trend = recency_trend(received)
    assert np.nanmedian(trend.sigma) > 0.5  # later keys receive more
    same = match_heads(head_distances(smollm2, smollm2, samples=1, length=32))
    assert (same["other"].to_numpy() == np.arange(9)).all() and float(same["distance"].max()) < 1e-9
