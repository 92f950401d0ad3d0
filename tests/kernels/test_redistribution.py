"""Redistribution against its dense form, and that against what the papers' authors do; a key bias beside it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.kernels import attention, columns, gathered, reference
from headscope.kernels.blocks import blocks, top_blocks
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case, random_moves
from headscope.kernels.checks.compare import ROUNDINGS, compare
from headscope.kernels.divergence import divergence
from headscope.kernels.fallback import EngineWarning, NotCompiled
from headscope.kernels.masks import Mask
from headscope.kernels.redistribute import pattern, redistribute
from headscope.kernels.redistribution import Redistribution, dense
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.scores import Scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels read no CPU memory where there is a card
SIZES: dict[str, Any] = {"batch": 2, "kv_heads": 1, "queries": 12, "keys": 40}
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"]
)


LATER = Redistribution(torch.arange(40) % 5 == 1, 0.3, onto=torch.arange(40) > 2)
NAMES = list(random_moves(random_case("causal", **SIZES)))


def moved(case: Case, name: str) -> Case:
    return replace(case, move=random_moves(case)[name])


def answer(case: Case, request: Request, engine: str = "auto") -> Reduced:
    return case.run(functools.partial(redistribute, engine=engine), request)


def wrong(case: Case, request: Request, engine: str = "auto") -> list[str]:
    return [str(v) for v in compare(answer(case, request, engine), case, request) if not v.holds]


@pytest.mark.parametrize(("kind", "name"), [("causal", name) for name in NAMES] + [(kind, NAMES[2]) for kind in MASKS])
@OPTIONS
def test_every_reduction_is_of_the_edited_pattern(kind: str, name: str, options: dict[str, Any]) -> None:
    case = moved(random_case(kind, **SIZES, **options), name)
    for subset in (False, True):
        request = everything(case, subset=subset)
        assert not wrong(case, request)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@OPTIONS
def test_by_triton(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    case = moved(random_case("causal", **SIZES, **options, device=DEVICE), name)
    assert not wrong(case, everything(case), "triton")


GATHERED = [kind for kind in MASKS if "segments" not in kind and kind != "rule"]


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("kind", GATHERED)
def test_keys_that_are_gathered_are_seen_as_where_they_stood(kind: str, by_head: bool) -> None:
    pytest.importorskip("triton")
    case = random_case(kind, **SIZES, bias=True, device=DEVICE)
    assert case.bias is not None
    shape = (2, case.q.shape[1], 40) if by_head else (2, 1, 40)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.3
    chosen[0, 0] = False  # an example, or a head of one, without any
    hidden = replace(case, bias=torch.where(chosen, case.bias, -torch.inf))
    request = Request(lse=True, max=True, entropy=True)
    assert gathered.gathers(case, case.v, request, "triton")
    answer = gathered.attend(case, case.v, chosen, int(chosen.sum(-1).max()), request=request)
    assert not [str(v) for v in compare(answer, hidden, request) if not v.holds]


def test_sets_that_fill_little_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    case = random_case("causal", **SIZES, device=DEVICE)
    sizes: list[int] = []
    attend = gathered.attend
    monkeypatch.setattr(gathered, "attend", lambda *args, **given: sizes.append(args[3]) or attend(*args, **given))
    case = replace(case, move=Redistribution((torch.arange(40) % 3 == 0).to(DEVICE), 0.5))
    assert not wrong(case, Request(lse=True, entropy=True), "triton")
    assert sizes == [26, 14]


@pytest.mark.parametrize("kind, name", [(kind, "a head's own keys") for kind in GATHERED] + [("causal", "three")])
@OPTIONS
def test_few_keys_need_no_pass(kind: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as there are sets, less those of which the scores are computed alone: all but the largest."""
    few_keys = pytest.importorskip("headscope.kernels.triton.few_keys")
    case = moved(random_case(kind, **SIZES, **options, device=DEVICE), name)
    seen: list[int] = []
    few_scores = few_keys.few_scores
    monkeypatch.setattr(few_keys, "few_scores", lambda *args: seen.append(args[2]) or few_scores(*args))
    assert not wrong(case, Request(lse=True, columns=(Columns(sum=True),)), "triton")
    assert len(seen) == len(case.move.sets(case.q.device)) - 1


@pytest.mark.parametrize("built", [True, False])
def test_few_keys_in_half_precision_beside_a_heavy_sink(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink holds nearly all: what the others give is not the difference of two outputs."""
    few_keys = pytest.importorskip("headscope.kernels.triton.few_keys")
    if not built:
        monkeypatch.setattr(few_keys, "add_few", _does_not_compile)
    case = random_case("full", **SIZES, dtype=torch.float16, device=DEVICE)
    bias = torch.zeros(1, 1, 40, device=DEVICE).index_fill(2, torch.tensor([0], device=DEVICE), 12.0)
    case = moved(replace(case, bias=bias), "no first key")
    if built:
        assert not wrong(case, Request(lse=True), "triton")
    else:
        with pytest.warns(EngineWarning, match="PyTorch"):
            assert not wrong(case, Request(lse=True), "triton")


def _does_not_compile(*_: Any) -> None:
    raise NotCompiled("it does not", first=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    case = moved(random_case("causal", **SIZES, dtype=dtype, sinks=True), "onto a set")
    assert not wrong(case, everything(case))


def test_what_a_heavy_sink_hides_is_not_lost() -> None:
    """The sink holds all but a hundred-millionth; taken away, the others hold everything, to float32's precision."""
    case = random_case("full", **SIZES)
    case.k[:, :, 0] = 0.0
    case = replace(case, bias=torch.zeros(1, 1, 40).index_fill(2, torch.tensor([0]), 30.0))
    case = moved(case, "no first key")
    assert answer(case, Request(lse=True, linear=torch.ones(40, 1))).linear.sub(1).abs().max() < ROUNDINGS  # type: ignore[union-attr]
    assert not wrong(case, everything(case))


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_of_the_edited_pattern(name: str) -> None:
    case = moved(random_case("left padding", **SIZES), name)
    found = pattern(case, case.move, rows=slice(3, 9), keys=slice(5, 31))
    assert (found - case.pattern()[:, :, 3:9, 5:31]).abs().max() < ROUNDINGS * case.score_size()


def gradients(case: Case, run: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of the output's squares, for q, k, v and a bias; by ``run``, or densely."""
    leaves = [
        x.detach().to(dtype).clone().requires_grad_() for x in (case.q, case.k, case.v, case.bias) if x is not None
    ]
    here = replace(case, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3])
    v = leaves[2].repeat_interleave(case.q.shape[1] // case.v.shape[1], 1)
    out = here.pattern(dtype) @ v if run is None else here.run(run, Request(entropy=True)).output
    out.square().sum().backward()
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("name", ["onto a set", "two", "the other way round"])
def test_the_output_keeps_its_gradient(name: str) -> None:
    case = moved(random_case("left padding", **SIZES, bias=True), name)
    ours, want = (gradients(case, run, torch.float64) for run in (redistribute, None))
    assert len(ours) == 4 and all(torch.allclose(x, y) for x, y in zip(ours, want, strict=True))
    keep = torch.tensor([0.5, 0.7], requires_grad=True)
    for move in (Redistribution(torch.arange(40) < 3, keep), Redistribution(torch.arange(40) < 1, keep).then(LATER)):
        alone = replace(case, move=move).run(redistribute, Request()).output
        assert alone is not None and alone.requires_grad


@pytest.mark.parametrize("later", [None, LATER], ids=["alone", "then another"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("gap", [-110.0, -50.0, 30.0, 80.0, 110.0])
def test_sets_whose_mass_float32_cannot_hold(gap: float, keep: float, later: Redistribution | None) -> None:
    """Outputs and gradients as in float64, where a sink is e^110 times as heavy as all others, or they as it."""
    case = random_case("full", **SIZES)
    case = replace(case, bias=torch.zeros(1, 1, 40).index_fill(2, torch.tensor([0]), gap))
    move = Redistribution(torch.arange(40) < 1, keep)
    case = replace(case, move=move if later is None else move.then(later))
    exact = case.eager(Request()).output
    for request in (Request(), Request(lse=True, linear=torch.ones(40, 1))):
        got = answer(case, request)
        assert got.output is not None and (got.output - exact).abs().max() < 1e-4
    assert got.linear is not None and got.linear.sub(1).abs().max() < ROUNDINGS
    ours, want = gradients(case, redistribute, torch.float32), gradients(case, None, torch.float64)
    assert len(ours) == 4
    for x, y in zip(ours, want, strict=True):
        assert (x - y).abs().max() < 1e-4 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_a_move_emptied_take_what_a_later_one_gives(dtype: torch.dtype) -> None:
    """Emptied by a share of 0, by givers that ask for more than there is, or all but emptied: no precision decides."""
    at = torch.arange(40)
    c, b, e = at < 10, (at >= 10) & (at < 20), at >= 20
    case = random_case("full", **SIZES, dtype=dtype, sinks=True, bias=True)
    p = case.pattern()
    onto = torch.where(b, p, 0.0)
    onto /= onto.sum(-1, keepdim=True)  # b has what e had, in the proportion of its weights
    want = {
        "onto": torch.where(c, p * (p[..., c | b].sum(-1) / p[..., c].sum(-1))[..., None], 0.0),
        "lost": torch.where(c, p, 0.0),
    }
    gives = Redistribution(e, 0.0, onto=b)
    emptied = {
        "onto": Redistribution(c, 1e4, onto=b).then(gives),
        "lost": Redistribution(b, 0.0, freed="lost").then(gives),
        "all but": Redistribution(b, 1e-9, freed="lost").then(gives),
        "twice": Redistribution(b & (at < 15), 0.0, freed="lost")
        .then(Redistribution(b, 0.0, freed="lost"))
        .then(gives),
    }
    for name, move in emptied.items():
        whole = want["onto" if name == "onto" else "lost"] + onto * p[..., e].sum(-1, keepdim=True)
        assert (dense(p, move) - whole).abs().max() < 1e-8  # that share of b, and roundings
        assert (dense(p.to(dtype), move) - whole).abs().max() < ROUNDINGS
        here = replace(case, move=move)
        assert (pattern(here, move) - whole).abs().max() < ROUNDINGS * case.score_size()
        assert not wrong(here, Request(lse=True, entropy=True, columns=(Columns(sum=True),)))
    moves = emptied["onto"], emptied["twice"]
    for move in moves:
        ours, exact = (gradients(replace(case, move=move), run, torch.float64) for run in (redistribute, None))
        assert all(torch.allclose(x, y) for x, y in zip(ours, exact, strict=True))


def test_rows_are_computed_alone_where_they_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Request]] = []
    attend = attention.attend

    def noting(scores: Scores, v: torch.Tensor, **options: Any) -> Reduced:
        seen.append((scores.shape[2], options["request"]))
        return attend(scores, v, **options)

    monkeypatch.setattr(attention, "attend", noting)
    case = moved(random_case("window", **SIZES), "onto a set")
    rows = torch.tensor([2, 7])
    assert not wrong(case, Request(output=False, entropy=True, top=3, query_rows=rows))
    assert all(torch.equal(request.query_rows, rows) for _, request in seen)
    seen.clear()
    pattern(case, case.move, rows=slice(4, 6))
    assert [n for n, _ in seen] == [2, 2, 2]
    seen.clear()
    assert not wrong(case, Request(output=False, columns=(Columns(count=True),))) and not seen


def test_attention_calibration_as_its_authors_do_it() -> None:
    """ACT, methods' section 3: A (T, T) of one head; sinks after the first give 1 - beta of theirs to all others."""
    beta, case = 0.4, random_case("causal", batch=1, kv_heads=2, group=2, queries=30, keys=30)
    case = replace(case, bias=torch.where(torch.rand(1, 4, 30) < 0.1, 3.0, 0.0))
    given, expected = torch.zeros(1, 4, 30, dtype=torch.bool), []
    for head, weights in enumerate(case.pattern()[0]):
        received = weights.sum(0) / (30 - torch.arange(30))
        chosen = [j for j in torch.nonzero(received > 0.1)[:, 0].tolist() if j > 0]
        assert chosen
        given[0, head, chosen] = True
        freed = (1 - beta) * weights[:, chosen].sum(1)
        others, calibrated = weights.clone(), weights.clone()
        calibrated[:, chosen] *= beta
        others[1:, chosen] = 0
        expected.append(calibrated + freed[:, None] * others / others.sum(1, keepdim=True))
    move = Redistribution(given, beta)
    assert (dense(case.pattern(), move)[0] - torch.stack(expected)).abs().max() < 1e-12
    case = replace(case, move=move)
    assert not wrong(case, everything(case))


def test_visual_attention_redistribution_as_its_authors_do_it() -> None:
    """VAR, methods' section 2: heads and queries that look at the image take from sinks what its other tokens get."""
    keep, limit, least = 0.6, 0.5, 0.2
    case = random_case("causal", batch=1, kv_heads=2, group=2, queries=40, keys=40)
    image, sinks = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    image[5:25], sinks[[0, 7, 19]] = True, True
    p = case.pattern()
    seen = p[..., image].sum(-1)
    share = p[..., image & sinks].sum(-1) / (p[..., image] + 1e-6).sum(-1)
    chosen = (share <= limit) & (seen >= least) & (torch.arange(40) >= 25)
    assert 0 < int(chosen.sum()) < chosen.numel()
    expected = p.clone()
    budget = (1 - keep) * p[..., sinks].sum(-1, keepdim=True)
    expected[..., sinks] *= keep
    others = image & ~sinks
    expected[..., others] += budget * p[..., others] / p[..., others].sum(-1, keepdim=True)
    expected = torch.where(chosen[..., None], expected, p)
    move = Redistribution(sinks, torch.ones_like(seen).masked_fill(chosen, keep), onto=image)
    assert (dense(p, move) - expected).abs().max() < 1e-12
    case = replace(case, move=move)
    assert not wrong(case, everything(case))


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (Redistribution(torch.tensor([0, 3])), "keys must be bool"),
        (Redistribution(torch.zeros(39, dtype=torch.bool)), "keys must be bool"),
        (Redistribution(torch.zeros(40, dtype=torch.bool), onto=torch.zeros(2, 40, dtype=torch.bool)), "onto must be"),
        (Redistribution(torch.zeros(40, dtype=torch.bool), torch.ones(3)), "keep must be"),
        (Redistribution(torch.zeros(40, dtype=torch.bool), -0.1), "at least 0"),
        (Redistribution(torch.zeros(40, dtype=torch.bool), torch.nan), "at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(move: Redistribution, said: str) -> None:
    case = random_case("causal", **SIZES)
    with pytest.raises(ValueError, match=said):
        redistribute(case, case.v, move, request=Request())


@pytest.mark.parametrize("engine", ["streaming", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MASKS)
@OPTIONS
def test_columns_from_a_known_lse(kind: str, engine: str, options: dict[str, Any]) -> None:
    """Weighted columns, from less than the lse, and plain ones are those of the dense pattern."""
    case = random_case(kind, **SIZES, **options, device=DEVICE)
    weights = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(2)).mul(2).round().to(DEVICE)  # 0 among them
    for weight in (torch.ones_like(weights), weights):
        lse = case.run(reference.attend, Request(output=False, lse=True)).lse
        assert lse is not None
        norm = torch.where(weight > 0, lse - weight.log(), torch.inf)
        found = columns.columns(case, norm, queries=(3, 11), highest=True, engine=engine)
        real = case.mask.query_is_real(torch.arange(12, device=DEVICE))
        p = case.pattern() * weight[..., None] * (1 if real is None else real[:, None, :, None])
        limit = ROUNDINGS * case.score_size() * 2
        assert found.sum is not None and (found.sum - p[:, :, 3:11].sum(2)).abs().max() < 8 * limit
        assert found.max is not None and (found.max - p[:, :, 3:11].amax(2)).abs().max() < limit


@pytest.mark.parametrize("engine", ["streaming", "triton"])
def test_columns_of_no_query_or_no_visible_key_are_zero(engine: str) -> None:
    case = random_case("causal", batch=1, kv_heads=1, group=1, queries=4, keys=4, d_head=16, device=DEVICE)
    far = (Mask(key_offset=100), Mask(right=-9))
    for mask, queries in ((case.mask, (2, 2)), (far[0], None), (far[1], None)):
        options = {"queries": queries, "highest": True, "engine": engine}
        found = columns.columns(replace(case, mask=mask), torch.zeros(1, 1, 4, device=DEVICE), **options)
        assert found.sum is not None and found.sum.shape == (1, 1, 4) and (found.sum == 0).all()
        assert found.max is not None and found.max.shape == (1, 1, 4) and (found.max == 0).all()


def test_columns_of_another_lse_are_refused() -> None:
    """A kernel would read beyond its end."""
    case = random_case("causal", **SIZES)
    lse = torch.zeros(2, 2, 12)
    for wrong_lse, queries in ((lse[..., :1], None), (lse[..., :3], None), (lse, (4, 13)), (lse, (5, 4))):
        with pytest.raises(ValueError, match="lse must be"):
            columns.columns(case, wrong_lse, queries=queries)
    with pytest.raises(ValueError, match="bias must be"):
        columns.columns(replace(case, bias=torch.zeros(1, 1, 1)), lse)


def test_a_tile_is_a_run_of_rows_and_keys() -> None:
    case = moved(random_case("causal", **SIZES), "onto a set")
    for part in ({"rows": slice(0, 8, 2)}, {"keys": slice(None, None, -1)}):
        with pytest.raises(ValueError, match="a tile is a run"):
            attention.pattern(case, **part)
        with pytest.raises(ValueError, match="a tile is a run"):
            pattern(case, case.move, **part)


@pytest.mark.parametrize("kind", ["causal", "left padding", "rule"])
@pytest.mark.parametrize("sizes", [{"queries": 0}, {"batch": 0}])
def test_nothing_comes_of_nothing(kind: str, sizes: dict[str, int]) -> None:
    case = random_case(kind, **{**SIZES, **sizes}) if "batch" not in sizes else random_case(kind, **SIZES)
    if "batch" in sizes:
        case = replace(case, q=case.q[:0], k=case.k[:0], v=case.v[:0], mask=case.mask.select_batch(0, 0))
    lse = torch.zeros(case.q.shape[:3])
    assert columns.columns(case, lse).sum.shape == case.q.shape[:2] + (40,)
    assert blocks(case, size=4).numel() == 0
    assert top_blocks(case, size=4, top=2).mass.numel() == 0
    assert divergence(case, case).js.numel() == 0
    move = Redistribution(torch.arange(40) < 1)
    got = redistribute(case, case.v, move, request=Request(columns=(Columns(sum=True, count=True),)))
    assert got.output.shape == case.q.shape and not got.columns[0].sum.any()


def test_a_key_bias_rescales_and_renormalises() -> None:
    case = random_case("causal", queries=20, keys=20)
    weight = torch.ones(20)
    weight[[0, 3, 17]] = 0.25
    p = case.pattern() * weight
    p = p / p.sum(-1, keepdim=True)
    got = replace(case, bias=weight.log()[None, None]).run(
        attention.attend, Request(entropy=True, columns=(Columns(sum=True),))
    )
    assert got.entropy is not None and got.columns[0].sum is not None
    assert (got.entropy - torch.special.entr(p).sum(-1)).abs().max() < 1e-5
    assert (got.columns[0].sum - p.sum(2)).abs().max() < 1e-5
