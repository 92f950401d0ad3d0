"""The Triton kernels against the float64 definition, in Triton's interpreter where there is no GPU.

The interpreter has no bfloat16 arithmetic, so bfloat16 is checked on the GPU alone (``kernels/benchmarks/gpu.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import attention
from headscope.kernels import gpu_engine as triton_engine
from headscope.kernels.checks.cases import MASKS, Case, everything, paddings, random_case, random_edits
from headscope.kernels.checks.compare import compare
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.scores import Scores
from headscope.kernels.triton import edit_arguments
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.tuning import Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"softcap": 5.0, "sinks": True, "bias": True}
SHAPES = [  # queries, keys, d_head, d_value
    pytest.param(41, 41, 32, 32, id="prefill"),
    pytest.param(1, 70, 60, 48, id="one query"),
    pytest.param(33, 70, 16, 24, id="cached keys", marks=pytest.mark.slow),
    pytest.param(63, 130, 80, 80, id="63 queries", marks=pytest.mark.slow),
]


def _tiles(d: int, dtype: torch.dtype) -> list[int]:
    by_rows, by_columns = triton_tuning.row_tiles(d, 0, 1, dtype), triton_tuning.column_tiles(d, dtype)
    return [by_rows.rows, by_rows.keys, by_columns.rows, by_columns.keys]


def fails(case: Case, request: Request, engine: Callable[..., Reduced] = triton_engine.attend) -> list:
    return [v for v in compare(case.run(engine, request), case, request) if not v.holds]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries, keys, d, dv", SHAPES)
def test_every_reduction_under_every_mask(kind: str, queries: int, keys: int, d: int, dv: int) -> None:
    case = random_case(kind, kv_heads=1, queries=queries, keys=keys, d_head=d, d_value=dv, device=DEVICE)
    assert not fails(case, everything(case, top=2))


@pytest.mark.parametrize("offset", [0, 30])
def test_segments_that_are_not_runs_of_positions(offset: int) -> None:
    case = random_case("full", kv_heads=1, group=1, queries=60, keys=190, device=DEVICE)
    ids = torch.tensor([[3, 3, 0, 3, 7, 7, 0, 2], [5, 4, 3, 2, 1, 0, 8, 9]], device=DEVICE).repeat_interleave(40, 1)
    case = replace(case, mask=Mask(query_offset=130 + offset, key_offset=offset, right=40, segments=ids))
    assert not fails(case, everything(case, top=2))


@pytest.mark.parametrize("kind", ["causal", "band", "right padding"])
def test_subsets_of_rows_and_columns(kind: str) -> None:
    case = random_case(kind, kv_heads=1, queries=34, keys=50, device=DEVICE)
    assert not fails(case, everything(case, subset=True))


@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("padding", paddings(*_tiles(32, torch.float32)))
def test_padding_around_a_tile(kind: str, padding: tuple[int, int]) -> None:
    """Left padding of a tile of queries or more once dropped the last, partial tile of queries."""
    case = random_case(kind, kv_heads=1, group=1, queries=110, keys=110, padding=padding, device=DEVICE)
    assert not fails(case, Request(output=False, entropy=True, columns=(Columns(sum=True, max=True),)))


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128])
def test_padding_around_the_tiles_of_half_precision(d: int) -> None:
    for padding in paddings(*_tiles(d, torch.float16)):
        sizes = {"batch": 1, "kv_heads": 1, "group": 1, "queries": 300, "keys": 300, "d_head": d}
        case = random_case("full", **sizes, padding=padding, device=DEVICE)
        case = replace(case, q=case.q.half(), k=case.k.half(), v=case.v.half())
        assert not fails(case, Request(output=False, entropy=True, columns=(Columns(sum=True, max=True),))), padding


@pytest.mark.parametrize("option, queries", [*((name, 1) for name in OPTIONS), ("all three", 1), ("all three", 34)])
def test_logit_options(option: str, queries: int) -> None:
    chosen = OPTIONS if option == "all three" else {option: OPTIONS[option]}
    case = random_case("causal", queries=queries, keys=40, kv_heads=1, device=DEVICE, **chosen)
    assert not fails(case, everything(case, top=0))


DECLARED = ("distance slope", "key scale", "distance table", "rows and keys", "keys taken from rows", "recent keys")


def edited(kind: str, name: str, **options: object) -> Case:
    case = random_case(kind, kv_heads=1, device=DEVICE, **options)  # type: ignore[arg-type]
    return replace(case, edit=random_edits(case)[name])


@pytest.fixture
def no_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.kernels.gpu_engine.streaming.attend", lambda *_, **__: pytest.fail("streamed"))


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("queries, d", [(1, 60), (33, 16), pytest.param(63, 80, marks=pytest.mark.slow)])
def test_declared_edits(no_streaming: None, name: str, queries: int, d: int) -> None:
    case = edited("causal", name, queries=queries, keys=70, d_head=d)
    assert not fails(case, everything(case, top=0, subset=queries == 33))


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "rule"])
def test_every_term_under_every_mask(no_streaming: None, kind: str) -> None:
    case = edited(kind, "every term", queries=35, keys=41, **OPTIONS)
    assert not fails(case, Request(entropy=True, lse=True, columns=(Columns(sum=True, max=True),)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("queries, d, dv", [(1, 256, 256), (63, 60, 48), (63, 96, 128), (40, 256, 256)])
def test_every_term_at_every_width(no_streaming: None, dtype: torch.dtype, queries: int, d: int, dv: int) -> None:
    case = edited("left padding", "every term", queries=queries, keys=140, d_head=d, d_value=dv, dtype=dtype, **OPTIONS)
    assert not fails(case, everything(case, top=0))


def test_top_keys_of_edited_scores_are_streamed() -> None:
    case = edited("causal", "every term", queries=20, keys=30)
    assert not fails(case, Request(output=False, top=3))


def test_a_kernel_takes_no_function() -> None:
    case = edited("causal", "hidden keys", queries=20, keys=30)
    with pytest.raises(ValueError, match="declared score edits alone"):
        edit_arguments.argument(case.edit, case.q.device, None)


def test_a_softcap_leaves_small_scores_as_exact_as_they_were() -> None:
    x = torch.logspace(-5, 4, 300, dtype=torch.float64).float() * torch.tensor([1.0, -1.0]).repeat(150)
    q, k = torch.zeros(1, 1, 300, 16, device=DEVICE), torch.zeros(1, 1, 1, 16, device=DEVICE)
    q[0, 0, :, 0], k[0, 0, 0, 0] = x, 1.0
    request = Request(output=False, lse=True)  # of one key: its score
    lse = triton_engine.attend(Scores(q, k, Mask.full(), 1.0, softcap=50.0), k, request=request).lse
    want = 50 * torch.tanh(x.double() / 50)
    assert ((lse[0, 0].cpu() - want) / want).abs().max() <= 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("d, dv", [(16, 16), (80, 80), (96, 32), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths_and_precisions(d: int, dv: int, dtype: torch.dtype) -> None:
    case = random_case(
        "causal", batch=1, kv_heads=1, queries=40, keys=50, d_head=d, d_value=dv, dtype=dtype, device=DEVICE
    )
    assert not fails(case, everything(case, top=0))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(MASKS),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    queries=st.integers(1, 40),
    cached=st.integers(0, 40),
    d_head=st.sampled_from([16, 20, 33]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    bias=st.booleans(),
    subset=st.booleans(),
    seed=st.integers(0, 1_000),
)
def test_any_call(kind: str, queries: int, cached: int, subset: bool, seed: int, **options: object) -> None:
    case = random_case(kind, queries=queries, keys=queries + cached, seed=seed, device=DEVICE, **options)  # type: ignore[arg-type]
    assert not fails(case, everything(case, seed=seed, subset=subset, top=0))


def test_many_linear_columns_take_several_passes() -> None:
    case = random_case("causal", batch=1, kv_heads=1, queries=20, keys=20, dtype=torch.float16, device=DEVICE)
    request = Request(entropy=True, linear=torch.randn(20, 45, device=DEVICE), columns=(Columns(sum=True),))
    assert not fails(case, request)


@pytest.mark.parametrize("sinks", [False, True])
def test_split_keys_merge_to_the_same_rows(monkeypatch: pytest.MonkeyPatch, sinks: bool) -> None:
    """Decoding splits keys over programs; some splits see no key of a short example."""
    monkeypatch.setattr(triton_tuning, "decode_tiles", lambda *_: Tiles(16, 16, 4, 2))
    monkeypatch.setattr(triton_tuning, "key_splits", lambda *_: 4)
    for kind in ("window", "left padding", "empty rows"):
        case = random_case(kind, kv_heads=1, queries=3, keys=60, sinks=sinks, device=DEVICE)
        assert not fails(case, everything(case, top=0))


def test_a_negative_scale_reverses_the_scores() -> None:
    case = replace(random_case("causal", kv_heads=1, queries=20, keys=20, device=DEVICE), scale=-0.3)
    assert not fails(case, everything(case, top=0))


def test_strided_inputs_are_read_in_place() -> None:
    """A key/value cache is often a slice of a longer one, or (batch, position, head, d) transposed."""
    case = random_case("causal", queries=20, keys=30, device=DEVICE)
    long = torch.cat([case.k, case.k], 2)[:, :, :30]
    swapped = case.v.transpose(1, 2).contiguous().transpose(1, 2)
    strided = replace(case, k=long, v=swapped, q=case.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert not strided.k.is_contiguous() and not strided.v.is_contiguous()
    assert not fails(strided, everything(case, top=0))


def test_sink_logits_may_be_a_view() -> None:
    case = random_case("causal", queries=20, keys=20, kv_heads=1, sinks=True, device=DEVICE)
    assert case.sinks is not None
    apart = torch.stack([case.sinks, torch.full_like(case.sinks, 50.0)], -1)[:, 0]
    assert not fails(replace(case, sinks=apart), everything(case, top=0))


def test_features_that_half_precision_cannot_hold_stay_exact() -> None:
    case = random_case("full", batch=1, kv_heads=1, group=1, queries=40, keys=40, dtype=torch.float16, device=DEVICE)
    same = torch.full((40, 1), 1234.567, device=DEVICE)
    got = case.run(triton_engine.attend, Request(output=False, linear=same)).linear
    assert (
        got is not None and (got - 1234.567).abs().max() < 1.0
    )  # float16 alone is 0.4 off, times a mass of 1 +- 2^-11


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("size", [65_520.0, 1e7, 1e-7])
def test_features_beyond_the_range_of_half_precision(size: float, queries: int) -> None:
    case = random_case("causal", kv_heads=1, queries=queries, keys=40, dtype=torch.float16, device=DEVICE)
    gen = torch.Generator().manual_seed(0)
    spread = torch.logspace(-12, 12, 40)[torch.randperm(40, generator=gen)]
    for column in (torch.full((40,), size), size * torch.randn(40, generator=gen), spread):
        linear = torch.stack([column, torch.ones(40)], -1).to(DEVICE)
        request = Request(output=False, linear=linear)
        got, want = case.run(triton_engine.attend, request).linear, case.eager(request).linear
        # half precision keeps 2^-12 of each weight, and drops those below 2^-25 of the row's largest
        bound = case.pattern() @ linear.abs().double() * 2.0**-11 + linear.abs().double().sum(0) * 2.0**-24
        assert got is not None and want is not None and ((got - want).abs() <= bound).all()


def test_the_comparison_sees_a_planted_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window one key too narrow must show in every row result."""
    case = random_case("window", kv_heads=1, device=DEVICE)
    request = everything(case, top=0)

    def narrower(scores: Scores, v: torch.Tensor, request: Request) -> Reduced:
        mask = replace(scores.mask, left=scores.mask.left - 1)  # type: ignore[operator]
        return triton_engine.attend(replace(scores, mask=mask), v, request=request)

    assert not fails(case, request)
    assert {"lse", "entropy", "output", "columns[0].sum", "distance"} <= {
        v.name for v in fails(case, request, narrower)
    }


def test_auto_keeps_cpu_tensors_on_the_streaming_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Reduced:
        raise AssertionError("a CPU tensor reached Triton")

    monkeypatch.setattr(triton_engine, "attend", refuse)
    case = random_case("causal", queries=8, keys=8)
    assert case.run(attention.attend, Request(lse=True)).lse is not None


def test_where_a_query_stands_changes_nothing_that_follows_from_its_keys() -> None:
    """A decoding step that is replayed as a graph says where its keys begin and end, and holds one position."""
    case = random_case("full", kv_heads=1, queries=1, keys=70, device=DEVICE)
    batch = case.q.shape[0]
    ends = {"start": torch.arange(batch, device=DEVICE) * 7, "end": torch.full((batch,), 40, device=DEVICE)}
    first = (torch.arange(70, device=DEVICE) < 9)[:, None]
    request = Request(lse=True, max=True, entropy=True, linear=first, top=2)
    found = []
    for offset in (39, 3):
        moved = replace(case, mask=Mask(query_offset=offset, right=None, **ends))
        found.append(moved.run(triton_engine.attend, request))
    for name in ("output", "lse", "max", "entropy", "linear", "top_keys", "top_mass"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
