"""The kernels for Hopper against the float64 definition, emulated: their sums, and who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="the kernels for Hopper are written in Gluon")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from headscope.kernels import gpu_passes as passes
from headscope.kernels.checks.cases import Case, everything, paddings, random_case
from headscope.kernels.checks.compare import allowed, compare, distance
from headscope.kernels.divergence import dense, divergence
from headscope.kernels.hopper import bias as hopper_bias
from headscope.kernels.hopper import columns as hopper_columns
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.hopper import divergence as hopper_divergence
from headscope.kernels.hopper import heaviest as hopper_heaviest
from headscope.kernels.hopper import output as hopper_output
from headscope.kernels.hopper import output_tiles
from headscope.kernels.hopper import rows as hopper_rows
from headscope.kernels.hopper.bias import bias_tiles, pieces
from headscope.kernels.hopper.device import GROUP_ROWS, LOG2E
from headscope.kernels.hopper.emulated_block import Deadlock
from headscope.kernels.hopper.emulated_values import Value
from headscope.kernels.hopper.emulator import Emulated, emulated, translated
from headscope.kernels.hopper.features import _beside
from headscope.kernels.hopper.scores import capped
from headscope.kernels.masks import Mask
from headscope.kernels.request import Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.triton import listed
from headscope.kernels.triton.device import score
from headscope.kernels.triton.features import encode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels read no CPU memory where there is a card
WIDTHS = (64, 128)  # of which all else follows; others are filled up, or have smaller tiles
BASE: dict[str, Any] = {"kv_heads": 1, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def hopper_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls go to the Hopper kernels as on such a card, short ones too, and they run here."""
    monkeypatch.setattr(hopper, "_on_hopper", lambda _: True)
    monkeypatch.setattr(hopper, "FEWEST", 1)
    with emulated(hopper_rows, hopper_output, hopper_columns, hopper_heaviest, hopper_divergence):
        yield


def attend(scores: Scores, v: Tensor, *, request: Request, together: bool) -> Reduced:
    """What the Hopper kernels compute of a request, as an engine; ``together``: the output in the statistics' pass."""
    assert scores.edit is None
    q, k = scores.q, scores.k
    plain = scores.device_arguments
    call = {**plain, "sinks": scores.sinks}
    assert request.linear is not None
    assert hopper.takes(q, k, v, mask=call["mask"], scale=call["scale"], columns=encode(request.linear, q.dtype))
    where, wants = request.query_rows, frozenset({"lse", "max", "entropy", "distance", "linear"})
    if where is None:
        values, some, positions = (v if together else None), q, None
    else:
        values, some, positions = None, q[:, :, where], (where + call["mask"].query_offset).int()
    asked = wants if values is None else wants | {"output"}
    rows = passes.rows(some, k, values, features=request.linear, wants=asked, positions=positions, **call)
    every = rows if values is not None else passes.rows(q, k, v, wants=frozenset({"lse", "output"}), **call)
    found = (passes.columns(q, k, every.lse, queries=x.queries, highest=True, **plain) for x in request.columns)
    columns = tuple(ReducedColumns(sums, most) for sums, most in found)
    statistics = {name: getattr(rows, name) for name in wants}
    return Reduced(output=every.output, columns=columns, **statistics)


def request_of(case: Case, *, features: int, subset: bool = False) -> Request:
    """What the Hopper kernels compute, of ``everything``."""
    whole = everything(case, subset=subset, top=0, features=features)
    named = ("output", "lse", "max", "entropy", "linear", "distance", "query_rows")
    columns = tuple(replace(each, count=False) for each in whole.columns)
    return Request(**{name: getattr(whole, name) for name in named}, columns=columns)


def fails(case: Case, request: Request) -> list[Any]:
    ways = (True, False) if request.query_rows is None else (False,)
    found = [case.run(partial(attend, together=together), request) for together in ways]
    return [verdict for one in found for verdict in compare(one, case, request) if not verdict.holds]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(
    "kind",
    ["causal", "full", "window", "band", "future", "left padding", "right padding", "padding of full", "shifted keys"],
)
def test_every_mask(kind: str, d: int) -> None:
    case = random_case(kind, **BASE, batch=2, d_head=d, queries=200, keys=410)
    assert not fails(case, request_of(case, features=3))


@pytest.mark.slow
@pytest.mark.parametrize("d", WIDTHS)
def test_padding_around_the_tiles(d: int) -> None:
    for padding in paddings(GROUP_ROWS.value, hopper_columns.shape(d)[0]):
        case = random_case("full", **BASE, batch=1, group=1, d_head=d, queries=290, keys=290, padding=padding)
        assert not fails(case, request_of(case, features=3)), padding


@pytest.mark.parametrize("d", WIDTHS)
def test_rows_that_see_nothing_and_sink_logits(d: int) -> None:
    case = random_case("empty rows", **BASE, d_head=d, queries=400, keys=300, sinks=True)
    assert not fails(case, request_of(case, features=3))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("offset", [11, -7])
def test_bounds_of_keys_that_do_not_begin_at_0(offset: int, d: int) -> None:
    """Each bound alone is the tightest somewhere: a window, and padding on both sides, in absolute positions."""
    case = random_case("causal", **BASE, batch=2, d_head=d, queries=200, keys=330)
    start, end = (torch.tensor(x) + offset for x in ([40, 0], [330, 290]))
    mask = Mask(query_offset=offset + 130, key_offset=offset, left=150, right=3, start=start, end=end)
    case = replace(case, mask=mask)
    assert not fails(case, request_of(case, features=3))


@pytest.mark.parametrize("d", WIDTHS)
def test_spans_of_its_own_for_every_example(d: int) -> None:
    case = random_case("causal", **BASE, batch=2, d_head=d, queries=200, keys=900)
    request = request_of(case, features=0)
    assert request.linear is not None
    own = torch.stack([request.linear[0], request.linear[1].roll(150, 0)])
    assert not fails(case, replace(request, linear=own))


def test_scales_by_which_a_hidden_score_cannot_be_divided() -> None:
    case = random_case("causal", **BASE, d_head=64)
    assert hopper.takes(case.q, case.k, case.v, mask=case.mask, scale=1e-5)
    assert not hopper.takes(case.q, case.k, case.v, mask=case.mask, scale=1e-7)
    assert not hopper.takes(case.q, case.k, case.v, mask=case.mask, scale=-1.0)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("features", [0, 10])  # spans, which tiles of keys share; 32 columns for 10 random ones
@pytest.mark.parametrize(
    "kind, dtype", [("causal", torch.float16), pytest.param("window", torch.bfloat16, marks=pytest.mark.slow)]
)
def test_features(kind: str, dtype: torch.dtype, features: int, d: int) -> None:
    case = random_case(kind, **(BASE | {"dtype": dtype}), batch=2, d_head=d, queries=330, keys=900)
    assert not fails(case, request_of(case, features=features))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(
    "kind", ["window", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "future"))]
)
def test_rows_far_apart(kind: str, d: int) -> None:
    """Groups of one block pass on many tiles that others see, before theirs and after."""
    case = random_case(kind, **BASE, d_head=d, queries=1300, keys=1300)
    request = request_of(case, features=3, subset=True)
    assert not fails(case, request)


def far_rows(case: Case) -> tuple[Tensor, dict[str, Any]]:
    """Rows of a call near each other and far apart, and the call of their output alone."""
    at = request_of(case, features=3, subset=True).query_rows
    assert at is not None and case.mask.query_offset == 0
    wants = frozenset({"output"})
    return at, {"mask": case.mask, "scale": case.scale, "wants": wants, "positions": at.int()}


@pytest.mark.parametrize("d", WIDTHS)
def test_the_output_of_rows_far_apart(d: int) -> None:
    case = random_case("window", **BASE, d_head=d, queries=1300, keys=1300)
    at, call = far_rows(case)
    some = passes.rows(case.q[:, :, at], case.k, case.v, **call).output
    every = case.eager(Request(output=True)).output
    assert some is not None and every is not None
    assert (some - every[:, :, at]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * every.abs().max()


@pytest.mark.parametrize(
    "d, kind",
    [(80, "causal"), (96, "segments"), (256, "window"), (64, "chunks"), (128, "segments"), (64, "chunks from origin")],
)
def test_other_widths_and_rules_with_softcap_and_bias(d: int, kind: str) -> None:
    options = {"softcap": 5.0, "bias": True, "sinks": True} if d != 96 else {}
    batch = 2 if kind == "chunks from origin" else 1
    case = random_case(kind, **BASE, batch=batch, d_head=d, queries=200, keys=420, **options)
    assert not fails(case, request_of(case, features=0))


def plain(scores: Scores, v: Tensor, *, request: Request) -> Reduced:
    """Statistics, with the output where it is asked for, of a call without features."""
    wants = frozenset({"lse", "max", "entropy"} | ({"output"} if request.output else set()))
    rows = passes.rows(scores.q, scores.k, v, wants=wants, sinks=scores.sinks, **scores.device_arguments)
    return Reduced(output=rows.output, lse=rows.lse, max=rows.max, entropy=rows.entropy)


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("d, each", [(64, (2, 2)), (128, (1, 2)), (80, (2, 1))])
def test_a_bias_by_the_matrix_unit(
    d: int, each: tuple[int, int], output: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones, whose last bits matter, hidden keys, a head all of whose keys are; for every head, or example."""
    case = random_case("causal", **BASE, batch=2, d_head=d, queries=200, keys=330)
    monkeypatch.setattr(hopper_bias, "LEAST", 1)
    gen = torch.Generator().manual_seed(3)
    bias = 3.0 * torch.randn(*each, 330, generator=gen) + 300.0
    bias[torch.rand(bias.shape, generator=gen) < 0.2] = -torch.inf
    bias[-1, -1] = -torch.inf
    case = replace(case, bias=bias)
    request = Request(output=output, lse=True, max=True, entropy=True)
    assert bias_tiles(case.q, score(case.scale, None, case.bias), None, 128)[0] is not None
    assert not [verdict for verdict in compare(case.run(plain, request), case, request) if not verdict.holds]


@pytest.mark.parametrize("scale", [2e-6, 0.09, 30.0])
def test_pieces_of_a_bias_are_all_of_it(scale: float) -> None:
    given = score(scale, None, torch.randn(1, 1, 1000).mul(50).index_fill(2, torch.tensor([3]), -torch.inf))
    found = pieces(given)
    assert torch.isfinite(found).all() and found.dtype == torch.bfloat16 and not found[..., 3:].any()
    assert torch.equal(found.double().sum(-1).float(), given.bias / (scale * LOG2E.value))


@pytest.mark.parametrize("largest", [0.01, 0.6, 20.0])
@pytest.mark.parametrize("softcap, scale", [(50.0, 0.0884), (5.0, 1.0), (30.0, 2e-3)])
def test_softcap_to_its_roundings(softcap: float, scale: float, largest: float) -> None:
    """Half a rounding of c for the difference, one of 2 c each for the product, the quotient and the sum beneath it,
    half of one for the exponent: what ``capped`` says."""
    x = torch.linspace(-largest, largest, 64 * 128).view(64, 128) * (softcap / scale)
    found = translated(capped, {})(Value(x), score(scale, softcap, None)).x.double()
    exact = softcap * torch.tanh(x.double() * (scale / softcap)) * math.log2(math.e)
    assert (found - exact).abs().max() <= 4 * 2.0**-23 * softcap * math.log2(math.e)


def heaviest(case: Case, top: int) -> list[Any]:
    """What is wrong with the lists of the ``top`` heaviest keys, searched on Hopper."""
    asked = Request(output=False, top=top)

    def found(scores: Scores, v: Tensor, *, request: Request) -> Reduced:
        call = scores.device_arguments
        lse = passes.rows(scores.q, scores.k, None, sinks=scores.sinks, **call).lse
        assert lse is not None
        mass, keys = passes.top_keys(scores.q, scores.k, lse, count=request.top, **call)
        return Reduced(top_mass=mass, top_keys=keys)

    return [verdict for verdict in compare(case.run(found, asked), case, asked) if not verdict.holds]


@pytest.mark.parametrize(
    "kind, d, top, options",
    [
        ("causal", 64, 16, {}),
        ("window", 128, 3, {"softcap": 5.0, "bias": True, "sinks": True}),
        ("left padding", 64, 1, {}),
        ("full", 64, 32, {"keys": 20}),  # more than there are
    ],
)
def test_the_heaviest_keys(kind: str, d: int, top: int, options: dict[str, Any]) -> None:
    call: dict[str, Any] = {"queries": 130, "keys": 300, "batch": 2, "kv_heads": 1, "dtype": torch.float16} | options
    assert not heaviest(random_case(kind, d_head=d, **call), top)


@pytest.mark.parametrize("step", [0, 8])
def test_keys_for_which_a_list_has_no_room(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal scores, and heavy keys of which one thread has all: rows of such blocks are searched anew."""
    case = random_case("causal", kv_heads=1, batch=1, group=2, d_head=64, queries=130, keys=300, dtype=torch.float16)
    if step:
        case.k[:, :, ::step] += case.q[:, :1, :1].sign()
        case.q[:] = case.q.abs() * case.q[:, :1, :1].sign()
    else:
        case.q[:] = 0.0
    made, room = [], listed.room
    monkeypatch.setattr(listed, "room", lambda *given: made.append(room(*given)) or made[-1])
    assert not heaviest(case, 16)
    assert (made[0].counts == torch.tensor([16, 0, 0, 0])).all(-1).any()  # as the second search leaves them


@pytest.mark.parametrize(
    "kind, d, options",
    [
        ("causal", 64, {}),
        ("window", 128, {"sinks": True, "softcap": 5.0}),
        ("left padding", 256, {"queries": 200}),
        ("empty rows", 80, {"sinks": True}),
    ],
)
def test_distances_of_two_patterns(kind: str, d: int, options: dict[str, Any]) -> None:
    call: dict[str, Any] = {"queries": 130, "keys": 300, "batch": 2, "kv_heads": 1, "d_head": d} | options
    first = random_case(kind, **call, dtype=torch.float16)
    second = replace(random_case(kind, **call, dtype=torch.float16, seed=1), mask=first.mask)
    got, want = divergence(first, second, engine="triton"), dense(first.log_pattern(), second.log_pattern())
    low = dense(first.log_pattern(torch.float16), second.log_pattern(torch.float16))
    size = max(first.score_size(), second.score_size())
    for name, x, y, z in zip(got._fields, got, want, low, strict=True):
        assert distance(x, y) <= allowed(z, y, size=size), name


def test_a_pattern_is_no_distance_from_itself() -> None:
    case = random_case("causal", **BASE, d_head=64, queries=130, keys=200)
    got = divergence(case, case, engine="triton")
    assert not got.js.any() and not got.kl.any() and not got.tv.any()


# -- the emulator sees what a card would do ----------------------------------------------------------------------------


@gluon.jit
def _waits(bars):
    mbarrier.wait(bars.index(0), 0)


@gluon.jit
def _never_arrives(x):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), 2)
    mbarrier.arrive(bars.index(0))
    gl.warp_specialize([(_waits, (bars,)), (_waits, (bars,))], [4], [24])


@gluon.jit
def _does_not_wait(x):
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], None)
    a = gl.zeros([64, 16], gl.float32, None)
    p = warpgroup_mma(a, tile, a, is_async=True)
    gl.store(x + gl.arange(0, 64), gl.sum(p, 1))


@gluon.jit
def _waits_for_another(x):
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], None)
    a = gl.zeros([64, 16], gl.float32, None)
    first = warpgroup_mma(a, tile, a, is_async=True)
    last = warpgroup_mma(a, tile, a, is_async=True)
    warpgroup_mma_wait(1, deps=[first])
    warpgroup_mma_wait(1, deps=[last])


@pytest.mark.parametrize(
    "kernel, error, words",
    [
        (_never_arrives, Deadlock, "all of .* wait"),
        (_does_not_wait, RuntimeError, "before it was waited for"),
        (_waits_for_another, RuntimeError, "still being computed"),
    ],
)
def test_the_emulator_refuses(kernel: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Emulated(kernel)[(1,)](torch.zeros(64), num_warps=4)


@gluon.jit
def _forgets_the_scale(linear, c, before, state, FOLD: gl.constexpr):
    return linear + _beside(linear, state[1], FOLD) * c[None, :]


def test_a_planted_bug_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case("causal", **BASE, d_head=64, queries=300, keys=900)
    for module in (hopper_rows, output_tiles):
        monkeypatch.setattr(module, "leave", _forgets_the_scale)
    with emulated(hopper_rows, hopper_output):
        assert {verdict.name for verdict in fails(case, request_of(case, features=0))} == {"linear"}
