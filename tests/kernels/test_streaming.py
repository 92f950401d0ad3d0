"""The streaming engine, the output and the pattern against the float64 definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.kernels import attention, reference
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case
from headscope.kernels.checks.compare import ROUNDINGS, compare, tensors
from headscope.kernels.redistribute import redistribute
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import engine as streaming

SINGLE = torch.float32
SHAPES = {  # batch, kv_heads, group, queries, keys, d_head, d_value
    "one query": (2, 2, 2, 1, 40, 32, 32),
    "63 queries": (2, 1, 3, 63, 63, 60, 60),
    "cached keys": (1, 2, 1, 17, 63, 80, 48),
    "multi-head": (3, 2, 1, 33, 33, 96, 96),
    "wide heads": (1, 1, 4, 9, 70, 256, 64),
}


def fails(case: Case, request: Request, engine: Callable[..., Reduced], precision: torch.dtype = SINGLE) -> list:
    return [v for v in compare(case.run(engine, request), case, request, precision=precision) if not v.holds]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_reduction_under_every_mask(kind: str, shape: str) -> None:
    batch, kv, group, queries, keys, d, dv = SHAPES[shape]
    case = random_case(kind, batch=batch, kv_heads=kv, group=group, queries=queries, keys=keys, d_head=d, d_value=dv)
    for subset in (False, True):
        request = everything(case, subset=subset)
        for tile in (2_000, None):
            assert not fails(case, request, functools.partial(streaming.attend, tile=tile))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "window", "left padding"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 5.0}, {"sinks": True}, {"bias": True}, {"softcap": 3.0, "sinks": True, "bias": True}],
    ids=["plain", "softcap", "sinks", "bias", "all three"],
)
def test_precisions_and_logit_options(dtype: torch.dtype, kind: str, options: dict) -> None:
    case = random_case(kind, dtype=dtype, d_head=64, d_value=48, seed=1, **options)
    for subset in (False, True):
        assert not fails(case, everything(case, subset=subset), streaming.attend)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(MASKS),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 40),
    cached=st.integers(0, 40),
    d_head=st.sampled_from([16, 60, 80]),
    d_value=st.sampled_from([8, 33, 64]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    sinks=st.booleans(),
    bias=st.booleans(),
    subset=st.booleans(),
    tile=st.sampled_from([50, 1_000, None]),
    seed=st.integers(0, 1_000),
)
def test_any_call(
    kind: str, queries: int, cached: int, subset: bool, tile: int | None, seed: int, **options: object
) -> None:
    case = random_case(kind, queries=queries, keys=queries + cached, seed=seed, **options)  # type: ignore[arg-type]
    request = everything(case, seed=seed, subset=subset)
    assert not fails(case, request, functools.partial(streaming.attend, tile=tile))


def test_float64_inputs_give_float64_statistics() -> None:
    case = random_case("causal", dtype=torch.float64)
    got = case.run(streaming.attend, everything(case))
    assert got.lse is not None and got.lse.dtype == torch.float64
    assert not fails(case, everything(case), streaming.attend, torch.float64)


def _drops_the_last_key(scores: Scores, v: torch.Tensor, **options: Any) -> Reduced:
    return streaming.attend(replace(scores, mask=replace(scores.mask, right=-1)), v, **options)


def _forgets_the_scale(scores: Scores, v: torch.Tensor, **options: Any) -> Reduced:
    return streaming.attend(replace(scores, q=scores.q * 1.01), v, **options)


def _leaves_a_row_unwritten(scores: Scores, v: torch.Tensor, **options: Any) -> Reduced:
    got = streaming.attend(scores, v, **options)
    for x in (got.lse, got.output, got.entropy):
        assert x is not None
        x[0, 0, 3] = torch.empty_like(x[0, 0, 3])
    return got


@pytest.mark.parametrize("broken", [_drops_the_last_key, _forgets_the_scale, _leaves_a_row_unwritten])
def test_the_comparison_sees_planted_bugs(broken: Callable[..., Reduced]) -> None:
    case = random_case("causal")
    bad = {v.name for v in fails(case, everything(case), broken)}
    assert {"lse", "entropy", "output"} <= bad


def test_only_what_is_asked_for_comes_back() -> None:
    case = random_case("causal")
    got = case.run(attention.attend, Request(output=False, entropy=True))
    assert got.entropy is not None
    assert set(tensors(got)) == {"entropy"}


def test_empty_rows_are_as_documented() -> None:
    case = random_case("empty rows", queries=8, keys=8)
    got = case.run(streaming.attend, everything(case))
    empty = slice(0, 4)
    assert (got.lse[:, :, empty] == -torch.inf).all() and (got.max[:, :, empty] == -torch.inf).all()  # type: ignore[index]
    for x in (got.output, got.entropy, got.linear, got.distance, got.window_mass, got.top_mass, got.target_mass):
        assert x is not None and (x[:, :, empty] == 0).all()
    assert got.top_keys is not None and (got.top_keys[:, :, empty] == -1).all()
    assert got.columns[0].count is not None and (got.columns[0].count[..., -1] == 0).all()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_output_and_pattern_tile(kind: str, options: dict) -> None:
    case = random_case(kind, queries=21, keys=30, **options)
    want = case.eager(Request()).output
    assert want is not None
    assert (attention.output(case, case.v) - want).abs().max() < 1e-5
    tile = attention.pattern(case, rows=slice(2, 19), keys=slice(3, 27))
    assert (tile - case.pattern()[:, :, 2:19, 3:27]).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
@pytest.mark.parametrize("kind", ["causal", "window", "left padding"])
def test_the_output_keeps_its_gradient(kind: str, options: dict) -> None:
    case = random_case(kind, queries=9, keys=9, dtype=torch.float64, **options)
    gradients = []
    for engine in (attention.attend, functools.partial(attention.attend, engine="reference")):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        got = replace(case, q=leaves[0], k=leaves[1], v=leaves[2]).run(engine, Request(lse=True))
        assert got.lse is not None and not got.lse.requires_grad and got.output is not None
        got.output.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, want in zip(*gradients, strict=True):
        assert ours is not None and torch.allclose(ours, want)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 3, 4, 8)}, "share"),
        ({"q": torch.zeros(2, 4, 4, 9)}, "belong together"),
        ({"k": torch.zeros(2, 2, 8)}, "must be"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"bias": torch.zeros(2, 3, 5)}, "bias"),
        ({"bias": torch.zeros(3, 1, 5)}, "bias"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    case = random_case("causal", queries=5, keys=5, d_head=8)
    with pytest.raises(ValueError, match=message):
        replace(case, **change).run(attention.attend, Request())


def test_requests_that_do_not_fit_are_refused() -> None:
    case = random_case("causal", queries=5, keys=6)
    with pytest.raises(ValueError, match="linear"):
        case.run(attention.attend, Request(linear=torch.zeros(5, 2)))
    with pytest.raises(ValueError, match="targets"):
        case.run(attention.attend, Request(targets=torch.zeros(1, 6, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="engine"):
        case.run(functools.partial(attention.attend, engine="fast"), Request())


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels read no CPU memory where there is a card
RANGES = (None, (5, 17), (30, 31), (9, 40), (12, 12), (5, 17))


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 6, 40])], ids=["all rows", "some rows"])
@pytest.mark.parametrize("engine", ["streaming", "triton", "moved"])
@pytest.mark.parametrize("kind", ["causal", "window", "left padding", "right padding", "segments", "rule"])
def test_every_range_of_queries_has_its_own_columns(kind: str, engine: str, rows: Tensor | None) -> None:
    """Sums, maxima and counts of a dense float64 pattern, with grouped heads and sink logits."""
    case = random_case(kind, queries=41, keys=41, d_head=16, sinks=True, device=DEVICE)
    rows = None if rows is None else rows.to(DEVICE)
    asked = tuple(Columns(part, sum=True, max=n != 1, count=n < 4) for n, part in enumerate(RANGES))
    request = Request(output=rows is None, entropy=True, query_rows=rows, columns=asked)
    if engine == "moved":  # no key gives
        nobody = Redistribution(torch.zeros(41, dtype=torch.bool, device=DEVICE))
        got = redistribute(case, case.v, nobody, request=request)
    else:
        got = attention.attend(case, case.v, request=request, engine=engine)
    at = torch.arange(41, device=DEVICE)
    seen = reference.dense_mask(case.mask, case.q.shape, 41, case.q.device)
    real = case.mask.query_is_real(at)
    seen = seen if real is None else seen & real[:, None, :, None]
    s = torch.einsum("bhqd,bhkd->bhqk", case.q.double(), case.k.double().repeat_interleave(2, 1)) * case.scale
    p = s.masked_fill(~seen, -torch.inf).exp()
    p = p / (p.sum(-1, keepdim=True) + case.sinks.double().exp()[:, None, None])
    limit = ROUNDINGS * case.score_size()  # of a weight exp(s - lse); a sum has one a query
    for part, want, found in zip(RANGES, asked, got.columns, strict=True):
        inside = slice(*(part or (0, 41)))
        assert (found.sum - p[:, :, inside].sum(2)).abs().max() < 41 * limit
        most = torch.cat([p[:, :, inside], p.new_zeros(2, 4, 1, 41)], 2).amax(2)
        assert (found.max is None) == (not want.max) and (found.max is None or (found.max - most).abs().max() < limit)
        assert (found.count is None) == (not want.count)
        assert found.count is None or torch.equal(found.count.expand(2, 4, 41), seen[:, :, inside].sum(2))


@pytest.mark.parametrize("part", [(0, 42), (-1, 5), (7, 6)])
def test_a_range_outside_the_queries_is_refused(part: tuple[int, int]) -> None:
    """A kernel would read beyond its end."""
    with pytest.raises(ValueError, match="columns over the queries"):
        random_case("causal", queries=41, keys=41).run(attention.attend, Request(columns=(Columns(part, sum=True),)))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("engine", ["streaming", "triton", "flex", "auto"])
def test_a_scale_may_be_negative(engine: str, scale: float) -> None:
    """The library's causal attention gives NaN: it hides keys before it scales."""
    for kind, options in (
        ("causal", {}),
        ("full", {}),
        ("left padding", {"sinks": True}),
        ("window", {"softcap": 4.0}),
    ):
        case = replace(random_case(kind, queries=20, keys=20, d_head=16, device=DEVICE, **options), scale=scale)
        want = case.pattern() @ case.v.double().repeat_interleave(2, 1)
        entropy = torch.special.entr(case.pattern()).sum(-1)
        near = 20 * ROUNDINGS * case.score_size()  # 20 weights exp(s - lse) and values of about 1
        for request in (Request(), Request(lse=True, entropy=True)):
            got = attention.attend(case, case.v, request=request, engine=engine)
            assert (got.output - want).abs().max() < near
            assert got.entropy is None or (got.entropy - entropy).abs().max() < near
        assert (attention.output(case, case.v) - want).abs().max() < near
        q = case.q.clone().requires_grad_()
        attention.output(replace(case, q=q), case.v).sum().backward()
        assert torch.isfinite(q.grad).all()
