"""Edited scores: the definition by hand, and every engine on a CPU against it."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch

from headscope.kernels import attention, reference
from headscope.kernels.blocks import blocks
from headscope.kernels.blocks import dense as dense_blocks
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case, random_edits, random_moves
from headscope.kernels.checks.compare import compare
from headscope.kernels.divergence import dense as dense_divergence
from headscope.kernels.divergence import divergence
from headscope.kernels.edit_terms import Term
from headscope.kernels.redistribute import redistribute
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.score_edits import MOST, ScoreEdit, by_distance, distance_slope, key_scale
from headscope.kernels.streaming import engine as streaming

EDITS = ("distance slope", "key scale", "distance table", "hidden keys", "two, on some heads", "every term")
ALL_THREE = {"softcap": 5.0, "sinks": True, "bias": True}


def edited(kind: str, name: str, **options: object) -> Case:
    case = random_case(kind, **options)  # type: ignore[arg-type]
    return replace(case, edit=random_edits(case)[name])


def fails(case: Case, got: Reduced, request: Request) -> list:
    return [v for v in compare(got, case, request, precision=torch.float32) if not v.holds]


def test_the_definition_is_the_formula_on_every_single_pair() -> None:
    """Softcap, then bias, then the edit at absolute positions, then the mask: written out, one score at a time."""
    case = random_case("shifted keys", batch=2, kv_heads=1, queries=5, keys=6, d_head=8, **ALL_THREE)
    slopes, factors = torch.rand(2), torch.rand(2, 20)
    edit = key_scale(factors).then(distance_slope(slopes))
    got = reference.dense_scores(replace(case, scale=0.4, softcap=5.0, edit=edit))
    assert case.bias is not None and case.mask.query_offset == 10 and case.mask.key_offset == 11
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 5, 6))).tolist():
        s = 5.0 * torch.tanh(0.4 * (case.q[b, h, i] @ case.k[b, 0, j]) / 5.0) + case.bias[b, h, j]
        s = s * factors[h, 11 + j] - slopes[h] * ((10 + i) - (11 + j))
        want = s if 11 + j <= 10 + i + 2 else torch.tensor(-torch.inf)
        assert torch.isclose(
            got[b, h, i, j], want, rtol=1e-5, atol=1e-5
        )  # a dozen float32 roundings of numbers below 10


@pytest.mark.parametrize("of", ["one", "score", "size", "positive"])
@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("within", [None, (-1, 3)])
def test_a_term_is_its_formula_on_every_single_pair(of: str, slope: bool, within: tuple[int, int] | None) -> None:
    case = random_case("shifted keys", batch=2, kv_heads=1, queries=5, keys=6, d_head=8)
    tables = {"queries": torch.randn(2, 2, 5), "keys": torch.randn(1, 2, 6), "distances": torch.randn(2, 1, 4)}
    firsts = {"first_query": 10, "first_key": 11, "first_distance": -2}
    term = Term(of=of, slope=slope, within=within, **tables, **firsts)  # type: ignore[arg-type]
    got, s = (reference.dense_scores(replace(case, edit=edit)) for edit in (ScoreEdit.of(term), None))
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 5, 6))).tolist():
        apart, x = (10 + i) - (11 + j), s[b, h, i, j]
        w = tables["queries"][b, h, i] * tables["keys"][0, h, j] * tables["distances"][b, 0, min(max(apart + 2, 0), 3)]
        w = w * (apart if slope else 1) * (within is None or -1 <= apart <= 3)
        g = {"one": x.new_ones(()), "score": x, "size": x.abs(), "positive": x.clamp(min=0)}[of]
        want = x + w * g if 11 + j <= 10 + i + 2 else torch.tensor(-torch.inf)
        assert torch.isclose(got[b, h, i, j], want, rtol=1e-5, atol=1e-5)  # a dozen roundings of numbers below 30


def test_the_gradient_reaches_the_tables_of_a_term() -> None:
    """Also beside keys that it hides, whose scores have none."""
    case = random_case("causal", batch=1, kv_heads=1, group=1, queries=6, keys=6, dtype=torch.float64)
    hide = Term(keys=torch.tensor([[[0.0, -torch.inf, 0, 0, -torch.inf, 0]]], dtype=torch.float64))

    def total(keys: torch.Tensor) -> torch.Tensor:
        factor = Term(of="score", keys=keys, queries=torch.full((1, 1, 1), 0.5, dtype=torch.float64))
        return reference.pattern(replace(case, edit=ScoreEdit.of(hide, factor))).square().sum()

    assert torch.autograd.gradcheck(total, torch.randn(1, 1, 6, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0])])
def test_equal_scores_share_a_row_however_large(sinks: torch.Tensor | None) -> None:
    """Their lse is rounded to themselves; nothing but a shared row is a softmax."""
    s = torch.full((1, 2, 2, 3), 1e29)
    s[..., 2], s[:, :, 1] = -torch.inf, -torch.inf
    expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]).expand(1, 2, 2, 3)
    assert torch.equal(reference.normalise(s, sinks), expected)


def test_what_a_term_hides_no_later_one_brings_back() -> None:
    case = random_case("full", batch=1, kv_heads=1, group=1, queries=3, keys=4)
    keys = torch.tensor([[[0.0, -torch.inf, 0.5, -torch.inf]]])
    rows = torch.tensor([[[1.0, 0.0, 1.0]]])
    neutral = key_scale(torch.zeros(1, 4))
    edit = ScoreEdit.of(Term(queries=rows, keys=keys)).then(neutral).then(neutral)
    got = reference.dense_scores(replace(case, edit=edit))[0, 0]
    assert torch.equal(got == -torch.inf, (keys[0] == -torch.inf) & (rows[0, 0, :, None] > 0))
    assert (got[got > -torch.inf] == 0).all()


ENDS = {
    "one": (Term(keys=torch.tensor([[[0.0, -torch.inf, 0.5, -torch.inf]]])), [1, 3]),
    "of little weight": (Term(keys=torch.tensor([[[-torch.inf, 0, 0, 0]]]), queries=torch.full((1, 1, 1), 1e-30)), [0]),
    "of none": (Term(keys=torch.tensor([[[-torch.inf, 0, 0, 0]]]), queries=torch.zeros(1, 1, 1)), []),
    "below none": (Term(keys=torch.tensor([[[-torch.inf, 0, 0, 0]]]), queries=-torch.ones(1, 1, 1)), []),
    "two": (Term(keys=torch.tensor([[[-torch.inf, 0, 0, 0]]]), queries=torch.full((1, 1, 1), -torch.inf)), [0]),
    "products beyond float32": (
        Term(
            keys=torch.tensor([[[-torch.inf, 1e-30, 1e-30, 1e-30]]]),
            queries=torch.full((1, 1, 1), 1e-30),
            distances=torch.full((1, 1, 1), 1e-30),
        ),
        [0],
    ),
    "all keys": (Term(keys=torch.full((1, 1, 1), -torch.inf), queries=torch.full((1, 1, 1), 1e-8)), [0, 1, 2, 3]),
    "a finite end": (Term(keys=torch.tensor([[[-1e30, 0, -9e29, torch.finfo(torch.float32).min]]])), [0, 2, 3]),
    "far below": (Term(keys=torch.tensor([[[-1e28, -1e28, -1e28, -1e28]]])), []),
    "far above": (Term(keys=torch.tensor([[[1e30, 0, 0, 1e30]]]), queries=torch.full((1, 1, 1), 1e30)), []),
    "a score beyond": (Term(of="score", keys=torch.tensor([[[1e38, -1e38, 0, -torch.inf]]])), []),
    "within": (Term(keys=torch.full((1, 1, 1), -torch.inf), within=(-1, 9)), None),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("later", [False, True])
def test_every_engine_hides_the_same_at_the_ends_of_float32(name: str, later: bool) -> None:
    """And no later term brings a key back."""
    pytest.importorskip("triton")
    term, hidden = ENDS[name]
    back = (Term(keys=torch.full((1, 1, 1), 50.0)), Term(of="score", keys=torch.full((1, 1, 1), -0.9)))
    edit = ScoreEdit.of(term, *(back if later else ()))
    case = replace(random_case("full", batch=1, kv_heads=1, group=1, queries=3, keys=4, d_head=16), edit=edit)
    s = reference.dense_scores(case)[0, 0]
    want = torch.zeros(3, 4, dtype=torch.bool)
    want[:, hidden or []] = True
    if hidden is None:
        want = torch.arange(3)[:, None] - torch.arange(4) >= -1
    assert torch.equal(s == -torch.inf, want) and not s.isnan().any() and (s < torch.inf).all()
    request = Request(lse=True, max=True, entropy=True, columns=(Columns(sum=True),))
    exact = case.eager(request)
    for engine in ("reference", "streaming", "triton"):
        got = attention.attend(case, case.v, request=request, engine=engine)  # type: ignore[arg-type]
        found = {n: (getattr(got, n), getattr(exact, n)) for n in ("lse", "max", "output", "entropy")}
        found["sum"] = got.columns[0].sum, exact.columns[0].sum
        for n, (x, y) in found.items():
            if name.startswith("far ") and n not in (
                "lse",
                "max",
            ):  # what float32 keeps of the scores is the edit alone
                assert bool(x.isfinite().all()), (engine, n)
            else:  # weights carry the roundings of scores below 60; larger ones are relative to their size
                assert torch.allclose(x.double(), y, rtol=1e-5, atol=1e-4), (engine, n, x, y)


def test_an_edit_is_declared_while_all_of_it_is() -> None:
    slope, function = distance_slope(torch.ones(4)), ScoreEdit(lambda s, b, h, q, k: s)
    assert slope.in_kernels and slope.then(slope).on_heads([1], 4).in_kernels
    assert not slope.then(function).in_kernels and not function.then(slope).in_kernels
    assert not reduce(ScoreEdit.then, [slope] * (MOST + 1)).in_kernels


@pytest.mark.parametrize("name", ["every term", "hidden keys"])
def test_a_part_of_a_call_is_edited_as_the_whole(name: str) -> None:
    case = edited("causal", name, queries=9, keys=9)
    assert case.edit is not None
    whole = reference.dense_scores(case)[1:2, 1:2]
    part = replace(case, q=case.q[1:2, 1:2], k=case.k[1:2, :1], edit=case.edit.of_part(slice(1, 2), slice(1, 2)))
    assert torch.equal(reference.dense_scores(part), whole)


@pytest.mark.parametrize(
    "term, said",
    [
        (Term(queries=torch.ones(1, 3, 5)), "4 or 1"),
        (Term(keys=torch.ones(3, 1, 6)), "2 or 1"),
        (Term(keys=torch.ones(1, 1, 5)), "positions 0:5; the call has 0:6"),
        (Term(queries=torch.ones(1, 1, 5), first_query=2), "positions 2:7; the call has 1:6"),
    ],
)
def test_tables_of_another_call_are_refused(term: Term, said: str) -> None:
    case = replace(random_case("causal", queries=5, keys=6), edit=ScoreEdit.of(term))
    with pytest.raises(ValueError, match=said):
        case.run(attention.attend, Request(lse=True))


def test_terms_of_no_form_are_refused() -> None:
    with pytest.raises(ValueError, match="a term is of one, score, size, positive"):
        Term(of="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be"):
        Term(keys=torch.ones(5))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", EDITS)
def test_streaming_is_the_definition(kind: str, name: str) -> None:
    for queries, extra in ((33, {}), (3, ALL_THREE)):
        case = edited(kind, name, queries=queries, keys=50, **extra)
        for subset, tile in ((False, None), (True, 2_000)):
            request = everything(case, subset=subset)
            got = streaming.attend(case, case.v, request=request, tile=tile)
            assert not fails(case, got, request)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_edited_in_float32(dtype: torch.dtype) -> None:
    case = edited("causal", "distance table", dtype=dtype)
    assert not fails(case, case.run(attention.attend, everything(case)), everything(case))


@pytest.mark.parametrize("kind", ["causal", "left padding", "rule", "empty rows"])
@pytest.mark.parametrize("name", EDITS)
def test_output_and_pattern_follow_the_edit(kind: str, name: str) -> None:
    case = edited(kind, name, queries=21, keys=30, **ALL_THREE)
    want = case.eager(Request()).output
    assert want is not None
    assert (attention.output(case, case.v) - want).abs().max() < 1e-5
    tile = attention.pattern(case, rows=slice(2, 19), keys=slice(3, 27))
    assert (tile - case.pattern()[:, :, 2:19, 3:27]).abs().max() < 1e-5


def test_a_slope_over_distance_is_a_key_bias_up_to_a_constant_of_each_row() -> None:
    case = random_case("causal", queries=40, keys=40)
    slopes = torch.rand(4)
    got = replace(case, edit=distance_slope(slopes)).run(attention.attend, Request(entropy=True, lse=True))
    same = replace(case, bias=(slopes[:, None] * torch.arange(40))[None]).run(
        attention.attend, Request(entropy=True, lse=True)
    )
    assert got.lse is not None and same.lse is not None and got.entropy is not None and same.entropy is not None
    assert (got.entropy - same.entropy).abs().max() < 1e-4  # scores up to 40: 1e-4 is 20 of their roundings
    assert (got.lse - (same.lse - slopes[:, None] * torch.arange(40))).abs().max() < 1e-4


def test_scaled_scores_are_scaled_keys() -> None:
    case = random_case("window", group=1)
    factors = torch.rand(1, 63)
    got = replace(case, edit=key_scale(factors)).run(attention.attend, everything(case))
    scaled = replace(case, k=case.k * factors[0][:, None])
    assert not fails(scaled, got, everything(case))


def test_minus_infinity_hides_as_a_rule_does() -> None:
    case = random_case("causal")
    edit = ScoreEdit(lambda s, b, h, q, k: torch.where((q - k) % 3 == 1, -torch.inf, s))
    mask = replace(case.mask, rule=lambda b, h, q, k: (q - k) % 3 != 1)
    request = replace(
        everything(case), columns=(Columns(sum=True, max=True),)
    )  # the mask's own count knows nothing of an edit
    assert not fails(replace(case, mask=mask), replace(case, edit=edit).run(attention.attend, request), request)


def test_a_table_of_distances_holds_at_its_ends() -> None:
    table = torch.tensor([[1.0, 2.0, 4.0]])
    case = random_case("full", queries=6, keys=6, batch=1, kv_heads=1, group=1)
    got = reference.dense_scores(replace(case, scale=1.0, edit=by_distance(bias=table)))
    change = got - reference.dense_scores(replace(case, scale=1.0))
    want = table[0][(torch.arange(6)[:, None] - torch.arange(6)).clamp(0, 2)]
    assert torch.allclose(change[0, 0], want, atol=1e-5)


def test_other_heads_keep_their_numbers_to_the_bit() -> None:
    case = random_case("causal")
    edit = distance_slope(torch.ones(4)).on_heads([2], 4)
    plain = case.run(attention.attend, Request(entropy=True)).entropy
    same = replace(case, edit=ScoreEdit(lambda s, b, h, q, k: s)).run(attention.attend, Request(entropy=True)).entropy
    got = replace(case, edit=edit).run(attention.attend, Request(entropy=True)).entropy
    assert plain is not None and same is not None and got is not None
    assert torch.equal(got[:, [0, 1, 3]], same[:, [0, 1, 3]]) and (got[:, 2] - plain[:, 2]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["distance table", "every term"])
def test_the_gradient_passes_through_an_edit(name: str) -> None:
    case = edited("causal", name, dtype=torch.float64, queries=9, keys=9)
    leaf = case.q.clone().requires_grad_()
    got = replace(case, q=leaf).run(attention.attend, Request(lse=True)).output
    assert got is not None
    got.square().sum().backward()
    assert leaf.grad is not None
    step = torch.zeros_like(case.q)
    step[0, 1, 5, 3] = 1e-6
    ends = [replace(case, q=case.q + x).eager(Request()).output for x in (step, -step)]
    slope = (ends[0].square().sum() - ends[1].square().sum()) / 2e-6  # type: ignore[union-attr]
    assert abs(float(leaf.grad[0, 1, 5, 3] - slope)) < 1e-6 * max(1.0, abs(float(slope)))


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", ["left padding", "shifted keys"])
def test_what_follows_from_the_lse_follows_the_edit(kind: str, name: str) -> None:
    """Block maps, masses on single keys, redistribution, and the distance from the pattern as it was."""
    case = edited(kind, name, queries=33, keys=50, **ALL_THREE)
    request = Request(entropy=True, columns=(Columns(sum=True),))
    p = case.pattern()
    got = blocks(case, size=16, pool="sum")
    assert (got - dense_blocks(p, case.mask, 16, "sum")).abs().max() < 1e-4  # sums of up to 256 float32 weights
    keys = torch.tensor([2, 7, 40])
    targets = (keys + case.mask.key_offset).expand(1, 33, -1)
    named = case.run(attention.attend, Request(output=False, targets=targets)).target_mass
    assert named is not None and (named - p[..., keys]).abs().max() < 1e-5
    for move in random_moves(case).values():
        moved = replace(case, move=move)
        assert all(v.holds for v in compare(moved.run(redistribute, request), moved, request))
    plain = replace(case, edit=None, bias=None, softcap=None, sinks=None)
    apart = divergence(plain, case)
    exact = dense_divergence(plain.log_pattern(), case.log_pattern())
    for field, x, y in zip(apart._fields, apart, exact, strict=True):
        assert ((x == y) | ((x - y).abs() < 1e-4)).all(), field


def test_an_edit_of_another_shape_is_refused() -> None:
    case = replace(random_case("causal", queries=5, keys=5), edit=ScoreEdit(lambda s, b, h, q, k: s.sum(-1)))
    with pytest.raises(ValueError, match="returned"):
        case.run(attention.attend, Request(lse=True))


@pytest.mark.parametrize("engine", ["streaming", "triton"])
def test_engines_without_a_kernel_for_it_compute_it_by_streaming(engine: str) -> None:
    if engine == "triton":
        pytest.importorskip("triton")
    case = edited("causal", "a function's table")
    got = attention.attend(
        case,
        case.v,
        request=everything(case),
        engine=engine,  # type: ignore[arg-type]
    )
    assert not fails(case, got, everything(case))


def test_a_planted_bug_shows() -> None:
    case = random_case("causal")
    wrong = replace(case, edit=distance_slope(torch.full((4,), 0.051)))
    right = replace(case, edit=distance_slope(torch.full((4,), 0.05)))
    request = everything(case)
    assert not fails(right, right.run(attention.attend, request), request)
    assert {"lse", "entropy", "output", "columns[0].sum"} <= {
        v.name for v in fails(right, wrong.run(attention.attend, request), request)
    }
