"""The long-context benchmark at a tiny size: it runs to its table, its checks can fail, and a trace stays one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.benchmarks import long_context
from headscope.interp.benchmarks.checks import OneQuery, compare, compare_logits
from headscope.interp.benchmarks.shapes import SHAPES, estimate, random_model
from headscope.interp.sites import attached
from headscope.interp.statistics import KeyMass
from headscope.kernels.gpu_engine import AT_ONCE
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Reduced, Request

TOKENS = 192
EVERY_CASE = ["untraced", "rows", long_context.SPARSE, "rows and columns"]


@pytest.mark.parametrize("chunk", [0, 64])
def test_every_case_is_measured_checked_and_written(chunk: int, tmp_path: Path) -> None:
    cases = "; ".join([*EVERY_CASE, "attached", long_context.EDITED])
    arguments = ["--shape", "tiny", "--tokens", str(TOKENS), "--chunk", str(chunk), "--repeats", "2"]
    result = long_context.main([*arguments, "--cases", cases, "--out", str(tmp_path)])
    assert [case["case"] for case in result["cases"]] == [*EVERY_CASE, "attached", long_context.EDITED]
    for case in result["cases"]:
        assert len(case["seconds"]) == 2 and min(case["seconds"]) > 0
        unchecked = ("untraced", long_context.EDITED)
        assert case["case"] in unchecked or all(check["passed"] for check in case["checks"]), case
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()) == result
    table = written.with_suffix(".md").read_text()
    assert "| untraced |" in table and "1.00x" in table and "FAIL" not in table and table.count("pass") == 4


def test_a_case_that_fails_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = long_context.Benchmark.turn

    def failing(self: Any, case: str) -> dict[str, Any]:
        if case == "rows":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return turn(self, case)

    monkeypatch.setattr(long_context.Benchmark, "turn", failing)
    arguments = ["--shape", "tiny", "--tokens", str(TOKENS), "--repeats", "1", "--out", str(tmp_path)]
    found = {case["case"]: case for case in long_context.main(arguments)["cases"]}
    assert found["rows"]["error"] == "OutOfMemoryError: CUDA out of memory."
    assert all(len(found[case]["seconds"]) == 1 for case in EVERY_CASE if case != "rows")
    (page,) = tmp_path.glob("*.md")
    assert "| rows | OutOfMemoryError: CUDA out of memory. |" in page.read_text()


def test_the_checks_see_a_query_that_misses_a_tile_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(SHAPES["tiny"], TOKENS, "cpu"), torch.arange(TOKENS)[None]

    def checked() -> dict[str, bool]:
        one = OneQuery((0, 1), TOKENS - 1)
        with trace(model, [*long_context.rows(TOKENS), KeyMass()]) as tracer, attached(model, one):
            long_context.forward(model, ids, TOKENS)
        return {check["what"]: check["passed"] for check in compare(tracer.record, one, TOKENS)}

    right = checked()
    assert len(right) == 9 and all(right.values())
    attend = AttentionCall.attend

    def blind(call: AttentionCall, request: Request) -> Reduced:
        window = Mask(query_offset=0, left=TOKENS - 17)  # the last queries miss up to 16 keys
        return attend(call.with_(mask=window), request)

    monkeypatch.setattr(AttentionCall, "attend", blind)
    wrong = checked()
    seen = {what for what, passed in wrong.items() if not passed}
    assert seen == {what for what in wrong if f"query {TOKENS - 1}" in what}


def test_other_logits_are_not_within_rounding() -> None:
    plain = torch.randn(256, generator=torch.Generator().manual_seed(0))
    rounded = plain.to(torch.bfloat16).float()
    assert compare_logits(rounded, plain, 32)["passed"]
    assert not compare_logits(plain + 0.3 * plain.flip(0), plain, 32)["passed"]


def test_rows_and_columns_of_a_layer_are_asked_in_one_call_and_the_record_holds_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows, no windows, targets or top keys, few columns that are exact in half precision: one fused pass over the
    keys and one for the columns."""
    model, asked = random_model(SHAPES["tiny"], TOKENS, "cpu"), []
    attend = AttentionCall.attend

    def noting(call: AttentionCall, request: Request) -> Reduced:
        asked.append(request)
        seen = attend(call, request)
        wide = torch.zeros(*seen.linear.shape[:-1], 16)  # type: ignore[union-attr]
        seen.linear = wide[..., : seen.linear.shape[-1]].copy_(seen.linear)  # type: ignore[union-attr,arg-type]
        return seen  # with more columns than were asked for, as a kernel's tile has

    with trace(model, [*long_context.rows(TOKENS), KeyMass()]) as tracer:
        monkeypatch.setattr(AttentionCall, "attend", noting)
        long_context.forward(model, torch.arange(TOKENS)[None], TOKENS)
        kept = [
            value
            for piece in tracer._pass
            for kind in (*piece.values.values(), *(piece.parts or {}).values())
            for value in kind.values()
        ]
    assert len(asked) == SHAPES["tiny"].layers
    for request in asked:
        assert request.output and request.columns == (Columns(sum=True),) and request.query_rows is None
        assert not request.windows and not request.top and request.targets is None
        assert isinstance(request.linear, Tensor) and request.linear.dtype == torch.bool
        assert request.linear.shape[-1] <= AT_ONCE
    assert kept and all(value.untyped_storage().nbytes() == value.nbytes for value in kept)


def test_what_is_expected_of_memory() -> None:
    """Against the numbers of weights of the published models and tensors counted by hand."""
    eight = estimate(SHAPES["8b"], 131072, 131072, values=1)
    assert eight["weights"] == pytest.approx(8_030_261_248 * 2 / 2**30, rel=1e-3)
    assert eight["cache"] == 0 and eight["statistics"] == 0.5
    one = estimate(SHAPES["1b"], 1 << 20, 1 << 16, values=7)
    assert one["weights"] == pytest.approx(1_235_814_400 * 2 / 2**30, rel=1e-3)
    assert one["cache"] == 33 and one["statistics"] == 14 and one["device"] < 74  # a card of 80 GB
