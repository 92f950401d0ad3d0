"""A * dL/dA summed tile by tile against autograd through the dense pattern in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.kernels import reference
from headscope.kernels.checks.cases import MASKS, random_case
from headscope.kernels.saliency import dense, saliency, slopes
from headscope.kernels.streaming import weights

KEYS = 50


def wanted(case: Any, gradient: torch.Tensor) -> torch.Tensor:
    """w by autograd: A is a leaf, L = sum of gradient * z."""
    p = case.pattern().requires_grad_()
    z = p @ case.v.double().repeat_interleave(p.shape[1] // case.v.shape[1], 1)
    (slope,) = torch.autograd.grad((z * gradient.double()).sum(), p)
    return p.detach() * slope


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_under_every_mask(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CPU_HELD", 3 * KEYS * 8)  # several tiles
    case = random_case(kind, queries=33, keys=KEYS, **options)
    gradient = torch.randn(*case.q.shape[:3], case.v.shape[3])
    gradient[:, :, :4] = 0
    rows = torch.rand(case.q.shape[0], 33) < 0.5
    spans = torch.stack([torch.arange(KEYS) < 20, torch.arange(KEYS) % 3 == 0], -1)[None]
    w = wanted(case, gradient)
    got = saliency(case, case.v, gradient, spans=spans, rows=rows)
    some = w * rows[:, None, :, None]
    for found, expected in (
        (got.keys, some.abs().sum(2)),
        (got.signed_keys, some.sum(2)),
        (got.flow, some.sum(1).abs().sum(1)),
        (got.spans, w.abs() @ spans[:, None].double()),
        (got.signed_spans, w @ spans[:, None].double()),
    ):
        # weights of relative error 1e-5 (scores of some 10 in float32), times slopes of some 10, summed over 50
        assert (found - expected).abs().max() < 1e-3
        assert expected.abs().max() > 1e-1


def test_in_float64_it_is_the_definition() -> None:
    case = random_case("causal", queries=20, keys=20)
    wide = replace(case, q=case.q.double(), k=case.k.double())
    gradient = torch.randn(*case.q.shape[:3], case.v.shape[3], dtype=torch.float64)
    w = dense(wide, case.v.double(), gradient)
    torch.testing.assert_close(w, reference.pattern(wide) * slopes(gradient, case.v.double()))
    got = saliency(wide, case.v.double(), gradient)
    torch.testing.assert_close(got.keys, w.abs().sum(2))
    torch.testing.assert_close(got.flow, w.sum(1).abs().sum(1))
    assert got.spans.shape[-1] == 0


def test_known_by_hand() -> None:
    """Two keys of equal weight with values 1 and -3, dL/dz = 2: w = 1, -3."""
    case = random_case("full", queries=1, keys=2)
    q = torch.zeros(1, 1, 1, 4)
    one = replace(case, q=q, k=torch.zeros(1, 1, 2, 4))
    got = saliency(one, torch.tensor([[[[1.0], [-3.0]]]]), torch.tensor([[[[2.0]]]]))
    assert got.keys.flatten().tolist() == pytest.approx([1.0, 3.0])
    assert got.signed_keys.flatten().tolist() == pytest.approx([1.0, -3.0])


def test_without_a_gradient_nothing_is_read_and_all_is_zero() -> None:
    case = random_case("causal", queries=5, keys=5)
    got = saliency(case, case.v, torch.zeros(*case.q.shape[:3], case.v.shape[3]))
    assert not got.keys.any() and not got.flow.any()
    with pytest.raises(ValueError, match="gradient must be"):
        saliency(case, case.v, torch.zeros(1, 1, 1, 1))
