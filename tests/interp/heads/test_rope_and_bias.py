"""RoPE's failure rates against counting every draw, in cases whose rate is known, and on a model; biases of low rank.

Rates of n draws are within 5 standard errors, 5 / (2 sqrt(n)), of the probability that they estimate.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from headscope.interp import keep_attention
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.position import rope
from headscope.interp.heads.position.low_rank_bias import alibi_factors, apply_lowrank_bias, bias_factors, bias_rank
from headscope.interp.heads.position.rope import RopeFailures, failure_rates, rope_decay, rope_failures
from headscope.interp.models import LanguageModel
from headscope.interp.sites.rotary import Rotation, rotations
from headscope.interp.survey.tiny import tiny_model

DRAWS = 4000
ERROR = 5 / (2 * math.sqrt(DRAWS))


def one_pair(theta: float) -> Rotation:
    return Rotation(torch.tensor([theta]))


def rates(q: torch.Tensor, k: torch.Tensor, rotation: Rotation, context: int, **settings: float) -> dict[str, float]:
    found = failure_rates(q, k, rotation, context, settings=RopeFailures(**{"draws": DRAWS, **settings}), scale=1.0)
    return {name: float(value[0]) for name, value in found.items()}


def test_rates_are_what_counting_gives() -> None:
    """Three queries, three keys, a context of 6: every draw there is, in plain Python."""
    rotation = Rotation(torch.tensor([1.0, 0.3]), interleaved=True, first=1)  # 5 dimensions, the first does not turn
    torch.manual_seed(0)
    q, k, context = torch.randn(1, 3, 5), torch.randn(1, 3, 5), 6
    found = rates(q, k, rotation, context, eps=0.05, curves=DRAWS, pool=3)

    def score(i: int, j: int, D: int) -> float:
        total = float(q[0, i, 0] * k[0, j, 0])
        for n, theta in enumerate((1.0, 0.3)):
            (a, b), (c, d) = (x[1 + 2 * n : 3 + 2 * n].tolist() for x in (q[0, i], k[0, j]))
            total += math.cos(theta * D) * (a * c + b * d) + math.sin(theta * D) * (a * d - b * c)
        return total

    local, order, place, token = [], [], [], []
    pairs, every = list(itertools.product(range(3), range(3))), range(context + 1)
    for i, j in pairs:
        for far in every[1:]:
            near = range(far // 2 + 1)
            local += [(score(i, j, D) < score(i, j, far), 1 / len(near)) for D in near]
        for other in {0, 1, 2} - {j}:
            sign = [score(i, j, D) > score(i, other, D) for D in every]
            order += [a != b for a, b in itertools.product(sign, sign)]
        place += [any(abs(score(i, j, D) - score(i, j, E)) <= 0.05 for E in every if E != D) for D in every]
        token += [any(abs(score(i, j, D) - score(i, m, D)) <= 0.05 for m in {0, 1, 2} - {j}) for D in every]
    wanted = np.average([x for x, _ in local], weights=[w for _, w in local])
    assert abs(found["locality"] - wanted) < ERROR and 0.1 < wanted < 0.9
    for name, counted in (("relevance", order), ("position_collision", place), ("token_collision", token)):
        assert abs(found[name] - np.mean(counted)) < ERROR, name
        assert 0.02 < np.mean(counted) < 0.98, "a rate of 0 or 1 would show nothing"


def test_rates_that_are_known() -> None:
    """One pair that turns by half a circle at most falls steadily; one that turns often is a coin."""
    q = torch.tensor([[[1.0, 0.0]] * 4])
    k = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    slow = rates(q, k, one_pair(math.pi / 65), 64, eps=1e-9)
    assert slow["locality"] == 0 and slow["position_collision"] == 0
    assert slow["token_collision"] == 0.5, "two of the four keys are the same"
    turned = rates(q, -k, one_pair(math.pi / 65), 64, eps=1e-9)
    assert turned["locality"] == 1
    whole = rates(q, k, one_pair(math.pi / 4), 64, eps=1e-5)
    assert whole["position_collision"] == 1, "after 8 positions the score comes again"
    torch.manual_seed(1)
    often = failure_rates(
        torch.randn(1, 500, 16), torch.randn(1, 500, 16), _based(16, 10.0), 50_000, settings=RopeFailures(draws=DRAWS)
    )
    assert all(abs(float(often[name]) - 0.5) < ERROR for name in ("locality", "relevance"))


def _based(d: int, base: float) -> Rotation:
    return Rotation((base ** (-torch.arange(0, d, 2).double() / d)).float())


def test_a_larger_base_tells_tokens_apart_and_positions_not() -> None:
    """The paper's trade, at 2,048 tokens of random queries and keys, which need not be those of any model."""
    torch.manual_seed(0)
    q, k = torch.randn(4, 200, 32), torch.randn(4, 200, 32)
    own = _based(32, 10_000.0)
    found = [
        failure_rates(q, k, own, 2048, settings=RopeFailures(draws=1000, base=base)) for base in (100.0, None, 1e8)
    ]
    relevance = [float(one["relevance"].mean()) for one in found]
    place = [float(one["position_collision"].mean()) for one in found]
    assert relevance[0] > relevance[1] + 0.05 > relevance[2] + 0.1
    assert place[0] < place[1] < place[2]
    same = failure_rates(q, k, own, 2048, settings=RopeFailures(draws=1000, base=10_000.0))
    assert all(torch.equal(same[name], found[1][name]) for name in same)


def test_scores_at_their_own_distance_are_the_models(grouped: LanguageModel, texts: list[str]) -> None:
    """q.k of the call, after RoPE, in float64; angles are rounded to float32 as the model rounds them: 1e-5."""
    ids = grouped.encode(texts[0])["input_ids"]
    turned = rotations(grouped, None)
    with keep_attention(grouped) as kept:
        grouped.forward(ids, logits=1, cache=False)
    for call in kept.calls:
        rotation = turned[call.module, call.layer]
        q, k = (rope._before(call, name, rotation) for name in ("query", "key"))
        k = k.repeat_interleave(2, 0)
        i, j = torch.tensor([30, 21, 40]), torch.tensor([4, 21, 39])
        pairs = rope._Pairs.of(q[:, i], k[:, j], rotation, call.scale)
        own = (call.query[0][:, i].double() * call.key[0].repeat_interleave(2, 0)[:, j].double()).sum(-1) * call.scale
        assert (pairs.at(i - j) - own).abs().max() < 1e-5 * own.abs().max()
        assert (pairs.at(i - j + 1) - own).abs().max() > 1e-2 * own.abs().max()
    found = rope_failures(grouped, texts, contexts=(8, 512), settings=RopeFailures(draws=50), length=40)
    assert found["locality"].sizes == {"layer": 2, "head": 4, "context": 2}
    one = failure_rates(q, k, rotation, 8, settings=RopeFailures(draws=50), scale=call.scale)
    alone = rope_failures(grouped, texts[0], contexts=(8,), settings=RopeFailures(draws=50), length=41, samples=1)
    for name, values in one.items():
        np.testing.assert_allclose(alone[name].isel(layer=-1, context=0), values, rtol=0, atol=1e-12)
    decided = ((found["relevance"] >= 0.4) & (found["relevance"] <= 0.6)).mean(["layer", "head"])
    np.testing.assert_allclose(found["undecided"].sel(rate="relevance"), decided)


def test_decay_is_the_sum_written_out(grouped: LanguageModel) -> None:
    found = rope_decay(grouped, [0, 1, 7])
    theta = 10_000.0 ** (-np.arange(4) / 4)
    for D in (0, 1, 7):
        sums = [abs(np.exp(1j * D * theta[: n + 1]).sum()) for n in range(4)]
        own = found.sel(distance=D).isel(layer=0)
        assert float(own["cosine"]) == pytest.approx(np.cos(D * theta).mean(), abs=1e-6)
        assert float(own["bound"]) == pytest.approx(np.mean(sums) / np.mean([1, 2, 3, 4]), abs=1e-6)
    assert float(rope_decay(grouped, [7], base=1e6)["cosine"][0, 0]) > float(found["cosine"][0, 2])


def test_what_has_no_rate_gets_one_line(grouped: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="no rotary position embedding"):
        rope_failures(LanguageModel.wrap(tiny_model("gpt2"), None, name="tiny", revision="seed"), [[3] * 9], length=9)
    with pytest.raises(HeadscopeError, match="at least two"):
        failure_rates(torch.ones(1, 1, 2), torch.ones(1, 1, 2), one_pair(1.0), 8)
    for settings in ({"draws": 0}, {"base": 1.0}):
        with pytest.raises(HeadscopeError, match="RopeFailures"):
            RopeFailures(**settings)


def test_a_bias_of_rank_three_has_rank_three() -> None:
    """And its energy is that of its singular values, which are known."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(2, 12, 3, dtype=torch.float64)).Q for _ in range(2))
    bias = u * torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64) @ v.transpose(-1, -2)
    assert bias_rank(bias).tolist() == [2, 2], "100 + 1 of 101.01"
    assert bias_rank(bias, 0.99).tolist() == [1, 1] and bias_rank(bias, 1.0).tolist() == [3, 3]
    assert bias_rank(torch.zeros(4, 4)).item() == 0
    qb, kb = bias_factors(bias, 2)
    assert ((qb @ kb.transpose(-1, -2) - bias).square().sum((-1, -2)) - 0.01).abs().max() < 1e-12
    with pytest.raises(HeadscopeError, match="finite"):
        bias_rank(bias.masked_fill(bias > 0, -torch.inf))
    with pytest.raises(HeadscopeError, match="has 1 to 12"):
        bias_factors(bias, 13)
    with pytest.raises(HeadscopeError, match="energy"):
        bias_rank(bias, 0.0)


@pytest.mark.parametrize("queries", [9, 3])
def test_alibi_is_of_rank_two_and_falls_with_distance(queries: int) -> None:
    """[q, Qb].[k, Kb] attends as the explicit bias does, with grouped keys; float64."""
    heads, keys = 4, 9
    qb, kb = alibi_factors(heads, queries, keys)
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    slope = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]).double()
    explicit = -slope[:, None, None] * (i - j)
    assert torch.equal(qb @ kb.transpose(-1, -2), explicit)
    assert queries < 9 or bias_rank(explicit, 1.0).tolist() == [2] * 4
    q, k, v = (torch.randn(2, n, m, 5, dtype=torch.float64) for n, m in ((heads, queries), (2, keys), (2, keys)))
    hidden = torch.zeros_like(explicit).masked_fill(j > i, -torch.inf)
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=explicit + hidden, enable_gqa=True)
    wide = apply_lowrank_bias(q, k, qb, kb)
    found = scaled_dot_product_attention(*wide, v, attn_mask=hidden, scale=1.0, enable_gqa=True)
    assert (found - wanted).abs().max() < 1e-12
    plain = scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
    assert (plain - wanted).abs().max() > 1e-2
