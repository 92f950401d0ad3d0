"""Span outputs against the dense pattern times the values of the span."""

from __future__ import annotations

import pytest
import torch

from headscope.kernels.checks import MASKS, Case, random_case
from headscope.kernels.spans import span_outputs

SPANS = [(0, 4), (4, 30), (30, 50), (10, 10)]


def call(case: Case) -> dict:
    return {name: getattr(case, name) for name in ("mask", "scale", "softcap", "sinks", "bias")}


def expected(case: Case, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    p = case.pattern()
    v = case.v.double().repeat_interleave(p.shape[1] // case.v.shape[1], 1)
    outputs = [p[..., a:b] @ v[:, :, a:b] for a, b in spans]
    return torch.stack(outputs, 3), torch.stack([p[..., a:b].sum(-1) for a, b in spans], -1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_spans_under_every_mask(kind: str, options: dict) -> None:
    case = random_case(kind, queries=33, keys=50, **options)
    got = span_outputs(case.q, case.k, case.v, SPANS, **call(case))
    output, mass = expected(case, SPANS)
    assert (got.output - output).abs().max() < 1e-5 and (got.mass - mass).abs().max() < 1e-5


def test_spans_that_partition_the_keys_add_up_to_the_output() -> None:
    case = random_case("causal", queries=33, keys=50)
    got = span_outputs(case.q, case.k, case.v, SPANS[:3], **call(case))
    whole = case.pattern() @ case.v.double().repeat_interleave(2, 1)
    assert (got.output.sum(3) - whole).abs().max() < 1e-5
    assert (got.mass.sum(-1) - 1).abs().max() < 1e-5


def test_every_example_may_name_its_own_spans() -> None:
    case = random_case("left padding", queries=50, keys=50, bias=True)
    spans = torch.tensor([[[0, 9], [20, 30]], [[40, 50], [3, 5]]])
    got = span_outputs(case.q, case.k, case.v, spans, **call(case))
    for b in range(2):
        output, mass = expected(case, [tuple(x) for x in spans[b].tolist()])
        assert (got.output[b] - output[b]).abs().max() < 1e-5 and (got.mass[b] - mass[b]).abs().max() < 1e-5


def test_a_span_outside_the_keys_is_refused() -> None:
    case = random_case("causal", queries=5, keys=5)
    with pytest.raises(ValueError, match="outside"):
        span_outputs(case.q, case.k, case.v, [(3, 9)], **call(case))
