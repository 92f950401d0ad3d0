"""Span outputs against the dense pattern times the values of the span."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.kernels import attention
from headscope.kernels.checks.cases import MASKS, Case, random_case, random_edits
from headscope.kernels.request import Reduced, Request
from headscope.kernels.scores import Scores
from headscope.kernels.spans import span_outputs
from headscope.kernels.streaming import engine as streaming

SPANS = [(0, 4), (4, 30), (30, 50), (10, 10)]


def expected(case: Case, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    p = case.pattern()
    v = case.v.double().repeat_interleave(p.shape[1] // case.v.shape[1], 1)
    outputs = [p[..., a:b] @ v[:, :, a:b] for a, b in spans]
    return torch.stack(outputs, 3), torch.stack([p[..., a:b].sum(-1) for a, b in spans], -1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_spans_under_every_mask(kind: str, options: dict) -> None:
    case = random_case(kind, queries=33, keys=50, **options)
    got = span_outputs(case, case.v, SPANS)
    output, mass = expected(case, SPANS)
    assert (got.output - output).abs().max() < 1e-5 and (got.mass - mass).abs().max() < 1e-5


def test_spans_that_partition_the_keys_add_up_to_the_output() -> None:
    case = random_case("causal", queries=33, keys=50)
    got = span_outputs(case, case.v, SPANS[:3])
    whole = case.pattern() @ case.v.double().repeat_interleave(2, 1)
    assert (got.output.sum(3) - whole).abs().max() < 1e-5
    assert (got.mass.sum(-1) - 1).abs().max() < 1e-5


def test_every_example_may_name_its_own_spans() -> None:
    case = random_case("left padding", queries=50, keys=50, bias=True)
    spans = torch.tensor([[[0, 9], [20, 30]], [[40, 50], [3, 5]]])
    got = span_outputs(case, case.v, spans)
    for b in range(2):
        output, mass = expected(case, [tuple(x) for x in spans[b].tolist()])
        assert (got.output[b] - output[b]).abs().max() < 1e-5 and (got.mass[b] - mass[b]).abs().max() < 1e-5


def test_a_span_outside_the_keys_is_refused() -> None:
    case = random_case("causal", queries=5, keys=5)
    with pytest.raises(ValueError, match="outside"):
        span_outputs(case, case.v, [(3, 9)])


@pytest.mark.parametrize("kind", ["causal", "left padding", "rule"])
def test_overlapping_spans(kind: str) -> None:
    case = random_case(kind, queries=33, keys=50, sinks=True)
    spans = [(0, 50), (10, 30), (20, 40), (20, 40), (49, 50)]
    got = span_outputs(case, case.v, spans)
    output, mass = expected(case, spans)
    assert (got.output - output).abs().max() < 1e-5 and (got.mass - mass).abs().max() < 1e-5


def test_every_key_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, attend, read = random_case("causal", queries=50, keys=50), attention.attend, []

    def counted(scores: Scores, v: torch.Tensor, **options: Any) -> Reduced:
        read.append((scores.shape[3], options["request"].output))
        return attend(scores, v, **options)

    monkeypatch.setattr(attention, "attend", counted)
    spans = [(5, 30), (20, 40), (45, 45)]
    got = span_outputs(case, case.v, spans)
    assert sum(n for n, _ in read) == 50 and sum(n for n, output in read if output) == 35
    read.clear()
    lse = case.run(streaming.attend, Request(output=False, lse=True)).lse
    again = span_outputs(case, case.v, spans, lse=lse)
    assert sum(n for n, _ in read) == 35
    assert (again.output - got.output).abs().max() < 1e-5 and (again.mass - got.mass).abs().max() < 1e-5
    read.clear()
    span_outputs(case, case.v, torch.tensor([[[5, 9]], [[6, 12]]]))
    assert len(read) == 3  # one call a segment, not one an example


def test_spans_of_an_edited_pattern() -> None:
    case = random_case("shifted keys", queries=33, keys=50, **{"softcap": 5.0, "sinks": True, "bias": True})
    for edit in random_edits(case).values():
        edited = replace(case, edit=edit)
        got = span_outputs(edited, case.v, SPANS)
        output, mass = expected(edited, SPANS)
        assert (got.output - output).abs().max() < 1e-5 and (got.mass - mass).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["causal", "right padding", "chunks", "empty rows"])
def test_spans_by_the_triton_kernels(kind: str) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = random_case(kind, queries=33, keys=50, kv_heads=1, d_head=16, sinks=True, device=device)
    spans = torch.tensor([[[0, 9], [5, 30], [50, 50]], [[40, 50], [3, 5], [0, 50]]], device=device)
    got = span_outputs(case, case.v, spans, engine="triton")
    for b in range(2):
        output, mass = expected(case, [tuple(x) for x in spans[b].tolist()])
        assert (got.output[b] - output[b]).abs().max() < 1e-5 and (got.mass[b] - mass[b]).abs().max() < 1e-5


@pytest.mark.parametrize("edit", [None, "every term"])
def test_spans_that_cut_up_the_keys_or_have_an_lse_in_one_launch(edit: str | None) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = random_case("window", queries=20, keys=50, kv_heads=1, d_head=16, sinks=True, bias=True, device=device)
    case = case if edit is None else replace(case, edit=random_edits(case)[edit])
    lse = case.run(streaming.attend, Request(output=False, lse=True)).lse
    for spans, known in ((SPANS, None), (SPANS, lse), ([(7, 9)], None)):
        got = span_outputs(case, case.v, spans, lse=known, engine="triton")
        output, mass = expected(case, spans)
        assert (got.output - output).abs().max() < 1e-5 and (got.mass - mass).abs().max() < 1e-5


def test_no_spans_and_spans_of_another_shape() -> None:
    case = random_case("causal", queries=5, keys=7)
    got = span_outputs(case, case.v, [])
    assert got.output.shape == (2, 4, 5, 0, 32) and got.mass.shape == (2, 4, 5, 0)
    with pytest.raises(ValueError, match="spans must be"):
        span_outputs(case, case.v, torch.zeros(3, 1, 2, dtype=torch.long))
