"""Distances between patterns against the dense float64 formulas, and against what they must be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headscope.kernels.checks.cases import MASKS, Case, random_case
from headscope.kernels.checks.compare import ROUNDINGS, allowed, distance
from headscope.kernels.divergence import Divergence, dense, divergence, output_distance
from headscope.kernels.masks import Mask
from headscope.kernels.scores import Scores

ENGINES = ["streaming", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(a: Case, b: Case, engine: str) -> Divergence:
    return divergence(a, b, engine=engine)


def wrong(a: Case, b: Case, engine: str) -> list[str]:
    got = run(a, b, engine)
    want = dense(a.log_pattern(), b.log_pattern())
    low = dense(a.log_pattern(a.q.dtype), b.log_pattern(b.q.dtype))
    size = max(a.score_size(), b.score_size())
    errors = [distance(x, y) for x, y in zip(got, want, strict=True)]
    limits = [allowed(x, y, size=size) for x, y in zip(low, want, strict=True)]
    return [name for name, error, limit in zip(Divergence._fields, errors, limits, strict=True) if not error <= limit]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_under_every_mask(kind: str, engine: str) -> None:
    first = random_case(kind, kv_heads=1, queries=33, keys=40, seed=0, device=DEVICE)
    second = replace(random_case(kind, kv_heads=1, queries=33, keys=40, seed=1, device=DEVICE), mask=first.mask)
    assert not wrong(first, second, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("other", ["window", "band", "segments", "left padding", "full"])
def test_two_runs_that_hide_other_keys_and_scale_and_cap_otherwise(other: str, engine: str) -> None:
    """Each pattern is made by its own rules; where one run hides a key that the other sees, KL is infinite."""
    first = random_case("causal", kv_heads=1, queries=33, keys=40, device=DEVICE)
    second = replace(random_case(other, kv_heads=1, queries=33, keys=40, device=DEVICE), scale=0.1, softcap=3.0)
    for a, b in ((first, second), (second, first), (first, replace(first, scale=0.4))):
        assert not wrong(a, b, engine)
    assert (dense(first.log_pattern(), second.log_pattern()).kl == math.inf).any() or other == "full"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_softcap_sinks_and_wide_heads(engine: str, dtype: torch.dtype) -> None:
    options = {"queries": 33, "keys": 40, "softcap": 5.0, "sinks": True, "dtype": dtype, "device": DEVICE}
    for d in (60, 96, 256):
        first = random_case("causal", kv_heads=1, d_head=d, seed=0, **options)
        second = random_case("causal", kv_heads=1, d_head=d, seed=1, **options)
        assert not wrong(first, second, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pattern_is_no_distance_from_itself(engine: str) -> None:
    case = random_case("causal", kv_heads=1, device=DEVICE)
    got = run(case, case, engine)
    assert got.js.abs().max() < 1e-6 and got.kl.abs().max() < 1e-6 and got.tv.abs().max() == 0
    assert (got.cosine - 1).abs().max() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_sinks_that_hold_nearly_all_of_the_mass(engine: str) -> None:
    """The cosine is that of the float64 formula though weights of e^-25 to e^-60 have squares that float32 has not."""
    first, second = (
        random_case("causal", kv_heads=1, d_head=16, queries=20, keys=20, seed=s, device=DEVICE) for s in (0, 1)
    )
    first = replace(first, sinks=torch.tensor([25.0, 60.0], device=DEVICE))
    for other in (first, replace(second, sinks=first.sinks), second):
        p, r = first.log_pattern().exp(), other.log_pattern().exp()
        want = torch.nn.functional.cosine_similarity(p, r, dim=-1, eps=0.0)
        got = run(first, other, engine)
        assert (got.cosine - want).abs().max() < 20 * ROUNDINGS * first.score_size()  # 20 weights exp(s - lse)
        assert not wrong(first, other, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_kl_is_infinite_where_a_key_is_lost_however_small_its_weight(engine: str) -> None:
    """e^-121 is no float32, and still more than nothing."""
    q, k = torch.zeros(1, 1, 3, 4, device=DEVICE), torch.zeros(1, 1, 3, 4, device=DEVICE)
    q[..., 0], k[0, 0, :, 0] = 1.0, torch.tensor([-120.0, 0.0, 1.0])
    got = divergence(Scores(q, k, Mask.causal(), 1.0), Scores(q, k, Mask.causal(window=2), 1.0), engine=engine)
    assert got.kl[0, 0, 2] == math.inf and (got.kl[0, 0, :2] == 0).all()
    assert all(torch.isfinite(x).all() for x in (got.js, got.tv, got.cosine))
    back = divergence(Scores(q, k, Mask.causal(window=2), 1.0), Scores(q, k, Mask.causal(), 1.0), engine=engine)
    assert back.kl[0, 0, 2].abs() < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_disjoint_patterns_are_as_far_apart_as_can_be(engine: str) -> None:
    case = random_case("full", batch=1, kv_heads=1, group=1, queries=8, keys=8, d_head=16, device=DEVICE)
    eye = 20.0 * torch.eye(8, 16, device=DEVICE)[None, None]
    one = replace(case, q=eye, k=eye, scale=0.1)
    other = replace(one, k=eye.roll(1, 2))
    got = run(one, other, engine)
    assert (got.js - math.log(2)).abs().max() < 1e-4 and (got.tv - 1).abs().max() < 1e-4
    assert (got.kl - 40).abs().max() < 1e-3  # the logit that the other pattern lacks, though its weight is 1e-18


def test_js_is_symmetric_and_kl_is_not() -> None:
    first, second = (random_case("causal", seed=s) for s in (0, 1))
    there, back = run(first, second, "streaming"), run(second, first, "streaming")
    assert torch.allclose(there.js, back.js, atol=1e-6)
    assert not torch.allclose(there.kl, back.kl, atol=1e-2)


def test_patterns_over_different_keys_are_refused() -> None:
    first, second = random_case("causal", keys=63), random_case("causal", keys=70)
    with pytest.raises(ValueError, match="different .batch, head, query, key"):
        run(first, second, "streaming")


def test_output_distance_is_the_norm_of_the_difference() -> None:
    a, b = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    b[0, 1, 2] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    want = torch.zeros(1, 2, 3)
    want[0, 1, 2] = 5.0
    assert torch.equal(output_distance(a, b), want)
