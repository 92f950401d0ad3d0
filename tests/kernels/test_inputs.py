"""What callers give in another form than is declared: the same answer from every engine, or one line that says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import attention
from headscope.kernels.checks.cases import Case, random_case
from headscope.kernels.checks.compare import compare
from headscope.kernels.edit_terms import Term
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.score_edits import ScoreEdit

ENGINES = pytest.mark.parametrize("engine", ["reference", "streaming", "triton"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, Any] = {"batch": 1, "kv_heads": 1, "queries": 9, "keys": 9, "d_head": 16, "device": DEVICE}


def wrong(case: Case, request: Request, engine: str) -> list[str]:
    found = attention.attend(case, case.v, request=request, engine=engine)  # type: ignore[arg-type]
    return [str(x) for x in compare(found, case, request) if not x.holds]


@ENGINES
def test_lists_are_as_good_as_tuples(engine: str) -> None:
    given: dict[str, Any] = {"windows": np.array([3, 5]), "columns": [Columns([2, 7], sum=True)]}  # type: ignore[arg-type]
    request = Request(**given)
    assert request.windows == (3, 5) and request.columns == (Columns((2, 7), sum=True),)
    assert len({request.numbers, Request(windows=(3, 5), columns=(Columns((2, 7), sum=True),)).numbers}) == 1
    assert not wrong(random_case("causal", **SIZES), request, engine)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Request(windows=[3.5]),  # type: ignore[list-item, arg-type]
        lambda: Request(windows=8),  # type: ignore[arg-type]
        lambda: Request(columns=Columns(sum=True)),  # type: ignore[arg-type]
        lambda: Columns(3),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_list_of_numbers_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


@ENGINES
def test_numpy_integers_are_positions(engine: str) -> None:
    case = random_case("causal", **SIZES)
    one = np.int64(1)
    mask = Mask(query_offset=one, key_offset=one, left=np.int32(4), right=one, chunk=np.int64(5))  # type: ignore[arg-type]
    assert {type(x) for x in (mask.query_offset, mask.key_offset, mask.left, mask.right, mask.chunk)} == {int}
    assert not wrong(replace(case, mask=mask), Request(lse=True, columns=(Columns(sum=True),)), engine)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_lazy_negation_is_refused(name: str) -> None:
    """A kernel would read the numbers that lie in memory, which have the other sign."""
    case = random_case("causal", **SIZES)
    with pytest.raises(ValueError, match="resolve_neg"):
        wrong(replace(case, **{name: torch._neg_view(getattr(case, name))}), Request(), "streaming")


@ENGINES
def test_tables_that_are_lazy_negations_are_read_as_they_are(engine: str) -> None:
    case, slope = random_case("causal", **SIZES), torch.rand(1, 2, 9, device=DEVICE)
    edited = replace(case, edit=ScoreEdit.of(Term(keys=-slope)))
    lazy = replace(case, edit=ScoreEdit.of(Term(keys=torch._neg_view(slope))))
    found, want = (attention.attend(x, x.v, request=Request(lse=True), engine=engine).lse for x in (lazy, edited))  # type: ignore[arg-type]
    assert found is not None and want is not None and torch.equal(found, want)


@ENGINES
def test_the_output_keeps_the_gradient_of_an_edits_table_alone(engine: str) -> None:
    case, table = random_case("causal", **SIZES), torch.rand(1, 2, 9, device=DEVICE)

    def output(keys: torch.Tensor, *, whole: bool = True) -> torch.Tensor:
        edited = replace(case, edit=ScoreEdit.of(Term(of="score", keys=keys)))
        found = attention.attend(edited, case.v, request=Request(), engine=engine).output if whole else None  # type: ignore[arg-type]
        return attention.output(edited, case.v) if found is None else found

    for whole in (True, False):
        leaf = table.clone().requires_grad_()
        output(leaf, whole=whole).square().sum().backward()
        assert leaf.grad is not None
        step = torch.zeros_like(table)
        step[0, 1, 3] = 1e-2
        slope = (output(table + step).square().sum() - output(table - step).square().sum()) / 2e-2
        # a central difference: off by step^2 / 6 of a third derivative (some tens) and eps of a sum near 100 over step
        assert abs(float(leaf.grad[0, 1, 3] - slope)) < 1e-2 and abs(float(slope)) > 0.1
