"""The Triton kernel of the heaviest keys against the float64 definition, in Triton's interpreter where there is no GPU.

A key is right if the exact pattern gives it the mass of the true one at its rank: equal scores may come in any order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import gpu_engine as triton_engine
from headscope.kernels import gpu_passes
from headscope.kernels.checks.cases import MASKS, Case, random_case
from headscope.kernels.checks.compare import compare
from headscope.kernels.request import Reduced, Request
from headscope.kernels.streaming import engine as streaming
from headscope.kernels.triton import few_lists, heaviest
from headscope.kernels.triton import topk as triton_topk
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.tuning import MOST_TOP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"softcap": 5.0, "sinks": True, "bias": True}


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "streamed" not in request.node.name:
        monkeypatch.setattr(streaming, "attend", lambda *_, **__: pytest.fail("computed by streaming"))


def fails(case: Case, top: int, rows: torch.Tensor | None = None) -> list:
    request = Request(output=False, top=top, query_rows=rows)
    got = case.run(triton_engine.attend, request)
    return [v for v in compare(got, case, request) if not v.holds] + _disorder(got)


def _disorder(got: Reduced) -> list:
    assert got.top_mass is not None and got.top_keys is not None
    wrong = [] if (got.top_mass.diff(dim=-1) <= 0).all() else ["not heaviest first"]
    return wrong if ((got.top_keys < 0) == (got.top_mass == 0)).all() else [*wrong, "keys without mass"]


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "rule"])
@pytest.mark.parametrize("queries, keys, d, short", [(41, 41, 32, True), (41, 41, 32, False), (1, 70, 60, True)])
def test_every_mask(monkeypatch: pytest.MonkeyPatch, kind: str, queries: int, keys: int, d: int, short: bool) -> None:
    """Many rows by two walks, and, as over more keys than these are for, by inserting."""
    if not short:
        monkeypatch.setattr(heaviest, "MOST_KEYS", 0)
    case = random_case(kind, kv_heads=1, queries=queries, keys=keys, d_head=d, device=DEVICE)
    for top in (1, 3):
        assert not fails(case, top)


def test_an_index_rule_is_streamed() -> None:
    assert not fails(random_case("rule", queries=9, keys=12, device=DEVICE), 2)


@pytest.mark.parametrize("top", [1, 2, 7, 32])
def test_every_length_of_list_up_to_more_than_there_are_keys(top: int) -> None:
    case = random_case("causal", batch=1, kv_heads=1, queries=20, keys=20, device=DEVICE)
    assert not fails(case, top)
    got = case.run(triton_engine.attend, Request(output=False, top=top))
    assert got.top_keys is not None and (got.top_keys[:, :, 0, 1:] == -1).all()


def test_equal_scores_fill_no_list_twice() -> None:
    case = random_case("causal", batch=1, kv_heads=1, queries=40, keys=200, device=DEVICE)
    case = replace(case, q=torch.zeros_like(case.q))
    assert not fails(case, 4)  # more keys reach the fourth of them than there is room for
    keys = case.run(triton_engine.attend, Request(output=False, top=4)).top_keys
    assert keys is not None and (keys[:, :, 4:].sort(-1).values.diff(dim=-1) > 0).all()


def test_longer_lists_are_streamed() -> None:
    assert not fails(random_case("causal", queries=40, keys=40, device=DEVICE), MOST_TOP + 1)


@pytest.mark.parametrize("option", [*OPTIONS, "all three"])
@pytest.mark.parametrize("queries", [2, 34])
def test_logit_options(option: str, queries: int) -> None:
    chosen = OPTIONS if option == "all three" else {option: OPTIONS[option]}
    case = random_case("causal", queries=queries, keys=40, kv_heads=1, device=DEVICE, **chosen)  # type: ignore[arg-type]
    assert not fails(case, 4)


@pytest.mark.parametrize("d", [16, 80, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths_and_precisions(d: int, dtype: torch.dtype) -> None:
    case = random_case("causal", batch=1, kv_heads=1, queries=63, keys=90, d_head=d, dtype=dtype, device=DEVICE)
    assert not fails(case, 5)


@pytest.mark.parametrize("kind", ["causal", "band", "right padding"])
def test_a_subset_of_rows(kind: str) -> None:
    case = random_case(kind, kv_heads=1, queries=34, keys=50, device=DEVICE)
    assert not fails(case, 3, rows=torch.arange(1, 34, 5, device=DEVICE))


@pytest.mark.parametrize("kind", ["causal", "window", "left padding", "empty rows"])
def test_split_keys_merge_to_the_same_lists(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Decoding splits keys over programs; some splits see no key, or fewer than the list holds."""
    monkeypatch.setattr(triton_tuning, "key_splits", lambda *_: 4)
    case = random_case(kind, kv_heads=2, queries=3, keys=150, sinks=True, device=DEVICE)
    assert not fails(case, 6)


@pytest.fixture
def spans_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of one query by its masses, as over many keys, in spans so short that the lists are many."""
    for module, name, value in ((gpu_passes, "FEWEST_OF_ONE", 0), (few_lists, "BUCKETS", 32), (few_lists, "WIDTH", 4)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(triton_topk, "top_keys", lambda *_, **__: pytest.fail("inserted"))


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "rule"])
def test_one_query_by_its_masses_under_every_mask(kind: str, spans_of_64: None) -> None:
    """The query may be padding itself, and a row may see fewer keys than its list holds, or none."""
    case = random_case(kind, kv_heads=1, queries=1, keys=150, sinks=True, device=DEVICE)
    assert not fails(case, 5)


@pytest.mark.parametrize("top", [1, 3, 16, 32])
def test_one_query_by_its_masses_in_any_number(top: int, spans_of_64: None) -> None:
    """Over 600 keys the lists of 32 are read as masses twice."""
    for keys in (7, 64, 600):
        case = random_case("causal", batch=1, kv_heads=1, queries=1, keys=keys, device=DEVICE, bias=True, softcap=5.0)
        assert not fails(case, top)


def test_equal_masses_of_one_query(spans_of_64: None) -> None:
    """More reach the fourth than there is room for, in every span and among the lists; and some have no mass at all."""
    case = random_case("causal", batch=1, kv_heads=1, queries=1, keys=600, device=DEVICE)
    assert not fails(replace(case, q=torch.zeros_like(case.q)), 4)
    far = torch.full((1, 1, 600), -1e4, device=DEVICE)
    far[..., 17:20] = 0.0
    assert not fails(replace(case, bias=far), 8)


def test_heads_that_share_no_program() -> None:
    """More queries of a key/value head than one program holds, each head by itself fewer than a tile."""
    assert not fails(random_case("causal", batch=1, kv_heads=2, group=5, queries=17, keys=30, device=DEVICE), 3)


def test_a_list_that_every_key_changes() -> None:
    """The kernel walks from the last key to the first: scores that grow towards the first change every list."""
    case = random_case("full", batch=1, kv_heads=1, group=1, queries=3, keys=80, d_head=16, device=DEVICE)
    q, k = torch.zeros_like(case.q), torch.zeros_like(case.k)
    q[..., 0], k[..., 0] = 1.0, torch.arange(80, 0, -1, device=DEVICE) / 8
    assert not fails(replace(case, q=q, k=k), 8)


def test_equal_scores_fill_a_list_with_different_keys() -> None:
    case = random_case("causal", batch=1, kv_heads=1, queries=40, keys=40, device=DEVICE)
    equal = replace(case, k=torch.ones_like(case.k))
    assert not fails(equal, 6)  # the comparison counts repeated keys as errors


def test_a_negative_scale_reverses_the_scores() -> None:
    assert not fails(replace(random_case("causal", kv_heads=1, queries=20, keys=20, device=DEVICE), scale=-0.3), 3)


def test_lists_of_other_lengths_are_refused() -> None:
    case = random_case("causal", queries=3, keys=3, device=DEVICE)
    for count in (0, 33):
        with pytest.raises(ValueError, match="1 to 32"):
            triton_topk.top_keys(case.q, case.k, case.q[..., 0], mask=case.mask, scale=1.0, count=count)


def test_the_comparison_sees_a_planted_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case("causal", kv_heads=1, queries=30, keys=30, device=DEVICE)
    whole = triton_topk.top_keys

    def misses_the_last_key(q, k, lse, *, mask, **options):  # type: ignore[no-untyped-def]
        return whole(q, k, lse, mask=replace(mask, right=-1), **options)

    monkeypatch.setattr(triton_engine, "top_keys", misses_the_last_key)
    assert {"top_mass", "top_keys"} <= {v.name for v in fails(case, 2) if not isinstance(v, str)}


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in MASKS if kind != "rule"]),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 70),
    cached=st.integers(0, 40),
    d_head=st.sampled_from([16, 20, 33]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    bias=st.booleans(),
    top=st.integers(1, 32),
    seed=st.integers(0, 1_000),
)
def test_any_call(kind: str, queries: int, cached: int, top: int, **options: object) -> None:
    case = random_case(kind, queries=queries, keys=queries + cached, device=DEVICE, **options)  # type: ignore[arg-type]
    assert not fails(case, top)
