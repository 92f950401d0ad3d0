"""In a float64 model an edit's own numbers are float64 too: the pattern is the edited one to float64's rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.prompts import prompt_boundary
from headscope.interventions import (
    AblateHeads,
    BoostRecent,
    DecayBeyondWindow,
    EmphasizeSpan,
    ForcePattern,
    HeadTemperature,
    Intervention,
    KnockOut,
    ScaleSinks,
    SpotLight,
)
from headscope.kernels.masks import Mask

N = 7
SPAN = torch.arange(N) < 2
FAR = (torch.arange(N)[:, None] - torch.arange(N)).abs() > 3


def either(held: Tensor, one: Tensor | float, other: Tensor | float) -> Tensor:
    """Numbers in float64, whatever torch's default is."""
    return torch.where(held, torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64))


def normalised(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def spotlit(p: Tensor) -> Tensor:
    psi = p[..., :2].sum(-1, keepdim=True)
    return normalised(p * either(SPAN & (psi < 0.7), 0.7 / psi, 1.0))


def sunk(p: Tensor) -> Tensor:
    kept = normalised(p * either(torch.arange(N) < 1, 0.3, 1.0))
    return torch.cat([p[..., :1, :], kept[..., 1:, :]], -2)  # the first row sees the sink alone


def forced(p: Tensor) -> Tensor:
    seen = (p > 0) & SPAN
    return 0.7 * p + 0.3 * seen.double() / seen.sum(-1, keepdim=True)


CASES = [
    (KnockOut(span=(0, 2), strength=0.3), lambda s, p: normalised(p * either(SPAN, 0.7, 1.0))),
    (EmphasizeSpan(span=(0, 2), inside=3.1), lambda s, p: normalised(p * either(SPAN, 3.1, 1.0))),
    (ScaleSinks(factor=0.3), lambda s, p: sunk(p)),
    (SpotLight(span=(0, 2), target=0.7), lambda s, p: spotlit(p)),
    (ForcePattern(onto=(0, 2), strength=0.3), lambda s, p: forced(p)),
    (HeadTemperature(temperature=1.7), lambda s, p: (s / 1.7).softmax(-1)),
    (DecayBeyondWindow(window=3, factor=0.9), lambda s, p: either(FAR & (s > 0), s * 0.9, s).softmax(-1)),
    (AblateHeads("L0H0,L0H1", "uniform", strength=0.3), lambda s, p: (s * 0.7).softmax(-1)),
    (BoostRecent(beta=0.4, window=2, previous="all"), None),
]


@pytest.mark.parametrize(("edit", "wanted"), CASES, ids=lambda x: type(x).__name__ if not callable(x) else "")
def test_the_pattern_is_right_to_float64(edit: Intervention, wanted: object) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, N, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    call = AttentionCall(q, k, v, Mask.causal(), 0.5, layer=0, module="m")
    scores = (0.5 * q @ k.transpose(-1, -2)).masked_fill(~torch.ones(N, N).tril().bool(), -math.inf)
    plain = scores.softmax(-1)
    with prompt_boundary(N):
        found = edit.edit(call).pattern()
    if wanted is None:
        apart = torch.arange(N)[:, None] - torch.arange(N)
        target = plain * either((apart >= 1) & (apart <= 2), 1.4, 1.0)
        target = target if not edit.renormalise else normalised(target)  # type: ignore[attr-defined]
    else:
        target = wanted(scores, plain)  # type: ignore[operator]
    assert found.dtype == torch.float64
    assert float((found - target).abs().max()) <= 64 * N * torch.finfo(torch.float64).eps
    assert float((found - plain).abs().max()) > 1e-3
