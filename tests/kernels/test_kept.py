"""What is lost where keys are left out: against softmax over the kept keys alone, in float64, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.kernels import reference
from headscope.kernels.checks.cases import MASKS, random_case
from headscope.kernels.kept import losses
from headscope.kernels.masks import Mask
from headscope.kernels.scores import Scores

KEYS, ROWS = 30, 20


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_it_is_softmax_over_the_kept_keys(kind: str, options: dict[str, Any]) -> None:
    case = random_case(kind, queries=ROWS, keys=KEYS, **options)
    wide = replace(case, q=case.q.double(), k=case.k.double())
    v = case.v.double()
    batch, heads = case.q.shape[:2]
    fixed = torch.rand(batch, heads, KEYS) < 0.5
    dense = torch.rand(batch, heads, ROWS, KEYS) < 0.3
    first, stop = 3, 17
    keeps = [fixed, lambda tile: dense[:, :, tile.rows, tile.keys], torch.ones(1, 1, KEYS, dtype=torch.bool)]
    some = torch.arange(KEYS).expand(batch, -1) % 3 > 0
    found = losses(wide, v, keeps, queries=(first, stop), counted=some, held=5 * batch * heads * KEYS)

    s = reference.dense_scores(wide)
    p = reference.normalise(s, case.sinks)
    values = v.repeat_interleave(heads // v.shape[1], 1)
    for got, shown in zip(found, (fixed[:, :, None], dense, torch.ones_like(dense)), strict=True):
        less = s.masked_fill(~shown, -torch.inf)
        q = reference.normalise(less, case.sinks)
        recall = (p * shown).sum(-1) / p.sum(-1)
        z = p @ values
        error = (z - q @ values).norm(dim=-1) / z.norm(dim=-1)
        kl = torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1)
        if case.sinks is not None:  # its weight is a term too
            sink = [torch.exp(case.sinks.double()[:, None] - reference.log_total(x, case.sinks)) for x in (s, less)]
            kl = kl + sink[1] * (sink[1] / sink[0]).log()
        empty, none = (s == -torch.inf).all(-1), (less == -torch.inf).all(-1)
        for name, wanted in (("recall", recall), ("error", error), ("divergence", kl)):
            mine, wanted = getattr(got, name), wanted[:, :, first:stop]
            assert mine[empty[:, :, first:stop]].isnan().all()
            known = ~(empty | (none if name == "divergence" else empty))[:, :, first:stop]
            torch.testing.assert_close(mine[known], wanted[known], atol=1e-9, rtol=1e-9)
        seen = (s > -torch.inf) & shown & some[:, None, None]
        known = ~empty[:, :, first:stop]
        assert torch.equal(got.kept[known], seen.sum(-1)[:, :, first:stop][known].double())


def test_a_row_by_hand() -> None:
    """Weights 1/2, 1/3, 1/6 on values 1, 2, 6: z = 13/6. Without the first key 2/3 and 1/3: z' = 10/3."""
    k = torch.tensor([3.0, 2.0, 1.0]).log()[None, None, :, None].double()
    scores = Scores(torch.ones(1, 1, 1, 1).double(), k, Mask.full(), 1.0)
    v = torch.tensor([1.0, 2.0, 6.0])[None, None, :, None].double()
    got, nothing = losses(scores, v, [torch.tensor([[[False, True, True]]]), torch.zeros(1, 1, 3, dtype=torch.bool)])
    assert float(got.recall) == pytest.approx(1 / 2)
    assert float(got.error) == pytest.approx((10 / 3 - 13 / 6) / (13 / 6))
    assert float(got.divergence) == pytest.approx(math.log(2))
    assert float(got.kept) == 2
    assert [float(x) for x in nothing] == pytest.approx([0.0, 1.0, math.inf, 0.0])


def test_what_does_not_belong_together_is_refused() -> None:
    case = random_case("causal", queries=4, keys=4)
    with pytest.raises(ValueError, match="lse must be"):
        losses(case, case.v, [], queries=(0, 2), lse=torch.zeros(1, 1, 1))
