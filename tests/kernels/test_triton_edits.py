"""What Triton's kernels do not ask of every pair under a declared edit, against the definition that does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import gpu_engine as triton_engine
from headscope.kernels import reference
from headscope.kernels.checks.cases import Case, random_case
from headscope.kernels.checks.compare import compare
from headscope.kernels.edit_terms import GONE, Term
from headscope.kernels.request import Columns, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton.edit_arguments import argument

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # as on a card, of pairs that do not count
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTORS = torch.tensor([-torch.inf, 1e-30, 0.5, 0.0, -0.5, -1e-30, -torch.inf], device=DEVICE)
PAIRS = [("queries", "keys"), ("queries", "distances"), ("keys", "distances")]
SLOPES = [("queries", "slope"), ("keys", "slope"), ("distances", "slope")]
MANY = [("queries", "keys", "distances"), ("keys", "distances", "slope"), ("queries", "keys", "distances", "slope")]
FEW, TILES = 5, 72  # queries that share a program, whatever their positions, and queries in runs


@pytest.fixture(autouse=True)
def no_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.kernels.gpu_engine.streaming.attend", lambda *_, **__: pytest.fail("streamed"))


def call(kind: str, edit: ScoreEdit, queries: int = TILES, keys: int = TILES, **options: Any) -> Case:
    sizes = {"batch": 1, "kv_heads": 1, "group": 1, "queries": queries, "keys": keys, "d_head": 16}
    return replace(random_case(kind, **sizes, device=DEVICE, **options), edit=edit)  # type: ignore[arg-type]


def fails(case: Case, request: Request) -> list:
    return [v for v in compare(case.run(triton_engine.attend, request), case, request) if not v.holds]


def everything(case: Case) -> Request:
    targets = (torch.tensor([3, 40], device=DEVICE) + case.mask.key_offset).expand(1, case.q.shape[2], -1)
    return Request(output=False, lse=True, entropy=True, targets=targets, columns=(Columns(sum=True),))


def every_factor(names: tuple[str, ...], within: tuple[int, int] | None) -> Term:
    """Each of ``FACTORS`` beside each, for pairs apart enough to be seen under a causal mask."""
    at = torch.arange(TILES, device=DEVICE)
    numbers = {"queries": FACTORS[at % 7], "keys": FACTORS[at // 7 % 7], "distances": FACTORS[at // 3 % 7]}
    tables = {name: numbers[name][None, None] for name in names if name != "slope"}
    return Term(slope="slope" in names, within=within, **tables)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [*PAIRS, *SLOPES, *MANY], ids=" ".join)
@pytest.mark.parametrize(
    "kind, queries, within", [("causal", TILES, None), ("full", TILES, (-40, 50)), ("causal", FEW, None)]
)
def test_factors_hide_by_their_signs(
    names: tuple[str, ...], kind: str, queries: int, within: tuple[int, int] | None
) -> None:
    """However small, two -inf too; not beside 0 or a negative number, nor by the distance of a key ahead."""
    case = call(kind, ScoreEdit.of(every_factor(names, within)), queries)
    i, j = torch.arange(queries, device=DEVICE)[:, None] + case.mask.query_offset, torch.arange(TILES, device=DEVICE)
    found = {
        "queries": FACTORS[i % 7],
        "keys": FACTORS[j // 7 % 7],
        "distances": FACTORS[(i - j).clamp(min=0) // 3 % 7],
    }
    factors = torch.stack([found[name].expand(queries, TILES) if name in found else i - j for name in names])
    never = factors == -torch.inf
    hidden = never.any(0) & (torch.where(never, 1.0, factors.sign()).prod(0) > 0)
    hidden &= (i - j >= within[0]) & (i - j <= within[1]) if within else True
    s, plain = (reference.dense_scores(x)[0, 0] for x in (case, replace(case, edit=None)))
    assert torch.equal(s == -torch.inf, hidden | (plain == -torch.inf))
    if queries == TILES:
        assert (hidden & (plain > -torch.inf)).any() and (never.any(0) & ~hidden).any()
    assert not fails(case, everything(case))


def number(x: float) -> Tensor:
    return torch.full((1, 1, 1), x, device=DEVICE)


def on_keys(x: float, every: int) -> Tensor:
    """``x`` on every so manieth key, and 0 on the others."""
    return torch.where(torch.arange(TILES, device=DEVICE) % every == 0, x, 0.0)[None, None]


LATER = {
    "turned round": (Term(of="score", queries=number(-2.0)),),
    "of their size": (Term(of="size", queries=number(3.0)),),
    "where positive": (Term(of="positive", queries=number(2.0)), Term(of="score", queries=number(-2.0))),
    "far above": (Term(queries=number(1e9), keys=number(1e9), distances=number(1e9)),),
    "far above by distance": (Term(queries=number(1e9), keys=number(1e9), distances=number(1e9), slope=True),),
    "all of it": (
        Term(queries=number(50.0)),
        Term(of="score", keys=number(-3.0)),
        Term(of="size", keys=number(1e9), slope=True),
    ),
}


@pytest.mark.parametrize("by", ["a bias", "a term"])
@pytest.mark.parametrize("name", LATER)
def test_no_term_brings_a_hidden_key_back(by: str, name: str) -> None:
    gone = on_keys(-torch.inf, 3)
    terms = LATER[name]
    case = call("full", ScoreEdit.of(*terms) if by == "a bias" else ScoreEdit.of(Term(keys=gone), *terms))
    case = replace(case, bias=gone if by == "a bias" else None, mask=replace(case.mask, query_offset=5_000))
    got = case.run(triton_engine.attend, everything(case))
    assert got.columns[0].sum is not None and not got.columns[0].sum[..., ::3].any()
    if "far" not in name and name != "all of it":  # those leave no digits of the scores
        assert not fails(case, everything(case))
    want = case.eager(Request(lse=True, max=True))
    assert got.lse is not None and torch.allclose(got.lse.double(), want.lse, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("after", [None, -0.5, -3.0])
def test_scores_that_leave_float32_end_where_it_says(terms: int, after: float | None) -> None:
    """At 1e29 all count the same, at -1e29 they are hidden, whatever comes after."""
    large = [Term(of="score", queries=number(1e9), keys=number(1e9))] * terms
    small = [] if after is None else [Term(of="score", queries=number(after)), Term(keys=on_keys(1.0, 2))]
    case = call("causal", ScoreEdit.of(*large, *small))
    s = reference.dense_scores(replace(case, edit=None))[0, 0]
    got = case.run(triton_engine.attend, Request(lse=True, max=True, entropy=True))
    want = case.eager(Request(lse=True, max=True, entropy=True))
    for x, y in ((got.lse, want.lse), (got.max, want.max)):
        assert x is not None and y is not None and torch.allclose(x.double(), y, rtol=1e-5)  # a few roundings
    if terms > 1:  # one is within
        alike = ((s > 0) & (s < torch.inf)).sum(-1)
        assert alike.max() > 10 and got.entropy is not None
        want_entropy = alike.clamp(min=1).double().log() * (after != -3.0)
        assert torch.allclose(got.entropy[0, 0].double(), want_entropy, atol=1e-5)  # of up to 72 keys: below 5


@pytest.mark.parametrize("queries", [FEW, TILES])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_whose_keys_are_all_hidden_saw_none(queries: int, sinks: bool) -> None:
    """Also where they are so by a score that is far from the kernel's own number for a hidden key."""
    far = Term(queries=number(-1e9), keys=number(1e9), distances=number(1e9), slope=True, within=(101, 500))
    case = call("full", ScoreEdit.of(far), queries, sinks=sinks)
    case = replace(case, mask=replace(case.mask, query_offset=200, key_offset=0))
    s = reference.dense_scores(case)
    assert bool((s == -torch.inf).all())
    case = replace(case, mask=replace(case.mask, query_offset=100 + TILES - queries // 2))
    s = reference.dense_scores(case)
    gone = (s == -torch.inf).all(-1)
    assert gone.any() and not gone.all()
    assert not fails(case, replace(everything(case), output=True, max=True))


def test_keys_that_programs_share_are_hidden_in_some() -> None:
    """Decoding: the keys of a row are split, and a part may see none of its own."""
    gone = torch.zeros(1, 2, 600, device=DEVICE)
    gone[:, 0, :400] = -torch.inf
    gone[:, 1] = -torch.inf
    case = random_case("causal", batch=1, kv_heads=1, queries=1, keys=600, d_head=16, device=DEVICE)
    case = replace(case, edit=ScoreEdit.of(Term(keys=gone)))
    assert not fails(case, Request(lse=True, entropy=True, columns=(Columns(sum=True),)))


def test_a_table_that_changes_is_read_anew() -> None:
    slopes = torch.full((1, 1, 1), -0.1, device=DEVICE)
    case = call("causal", ScoreEdit.of(Term(queries=slopes, slope=True)))
    assert not fails(case, Request(lse=True))
    slopes.mul_(3.0)
    assert not fails(case, Request(lse=True))


def test_a_table_of_distances_begins_and_ends_anywhere() -> None:
    """Before, within and behind a tile, of one head and of all."""
    gen = torch.Generator().manual_seed(0)
    for first, places, heads in ((-200, 150, 1), (-40, 7, 2), (10, 50, 2), (300, 5, 1), (0, 1, 2)):
        table = torch.randn(1, heads, places, generator=gen).to(DEVICE)
        case = random_case("full", batch=1, kv_heads=1, queries=40, keys=70, d_head=16, device=DEVICE)
        case = replace(case, edit=ScoreEdit.of(Term(distances=table, first_distance=first)))
        assert not fails(case, Request(output=False, entropy=True, columns=(Columns(sum=True),))), first


def test_some_of_the_rows_have_distances_of_their_own() -> None:
    table = torch.randn(1, 1, 50, device=DEVICE)
    rows = torch.arange(70, device=DEVICE) * 2
    for term in (Term(distances=table), Term(queries=number(-0.1), slope=True)):
        case = call("causal", ScoreEdit.of(term), queries=150, keys=150)
        assert not fails(case, Request(output=False, entropy=True, query_rows=rows))


def test_a_pair_is_asked_no_more_than_its_term_needs() -> None:
    """What a kernel is told of a chain: the questions that are compiled, each an instruction or two a pair."""
    asked = ("pair", "many", "later", "brings", "above", "below")

    def told(*terms: Term, right: int | None = 0) -> list[set[str]]:
        edit = argument(ScoreEdit.of(*terms), torch.device(DEVICE), right)
        assert edit is not None
        return [{name for name in asked if getattr(term, name) is not None} for term in edit.terms]

    slope, factor = Term(queries=number(-1.0), slope=True), Term(of="score", keys=number(2.0))
    assert told(slope) == [set()] and told(slope, right=None) == [{"pair"}]
    assert told(Term(distances=number(1.0))) == [set()]
    assert told(factor, slope) == [{"brings"}, {"later"}]
    assert told(factor, factor) == [{"brings"}, {"later", "brings", "above"}]
    assert told(factor, factor, slope)[1] == {"later", "brings", "above", "below"}
    assert abs(GONE) * 1e9 * 1.5 < torch.finfo(torch.float32).max  # why "below" is not asked of the last
