"""Gradients through softcap, sinks, bias and edits, a few rows at a time, against autograd of the dense pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.kernels import attention
from headscope.kernels.checks.cases import MASKS, random_case
from headscope.kernels.reference import pattern
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import backward

KEYS, QUERIES = 40, 33


def gradients(scores: Scores, v: torch.Tensor, out: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    inputs = [x for x in (scores.q, scores.k, v, scores.sinks, scores.bias, *more) if x is not None]
    return list(torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True, "bias": True, "softcap": 3.0}], ids=str)
def test_every_gradient_is_that_of_the_dense_pattern(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(kind, queries=QUERIES, keys=KEYS, d_head=8, dtype=torch.float64, **options)
    leaves = {
        name: getattr(case, name).double().requires_grad_()
        for name in ("q", "k", "sinks", "bias")
        if getattr(case, name) is not None
    }
    scores, v = replace(case, **leaves), case.v.clone().requires_grad_()
    dense = pattern(scores) @ v.repeat_interleave(2, 1)
    want = gradients(scores, v, dense)
    monkeypatch.setattr(backward, "HELD", 4 * 2 * KEYS * 5)  # five rows in a piece, seven pieces
    out = attention.output(scores, v)
    torch.testing.assert_close(out, dense)
    for _ in range(2):  # a graph that is kept is computed again as often as it is asked
        for found, expected in zip(gradients(scores, v, out), want, strict=True):
            torch.testing.assert_close(found, expected)


def test_what_an_edit_holds_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case("left padding", queries=QUERIES, keys=KEYS, d_head=8, dtype=torch.float64)
    slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    edit = ScoreEdit(lambda s, b, h, q, k: s * slope - slope * (q - k) * (1 + h))
    leaves = {name: getattr(case, name).requires_grad_() for name in ("q", "k")}
    scores, v = replace(case, edit=edit, **leaves), case.v.clone().requires_grad_()
    want = gradients(scores, v, pattern(scores) @ v.repeat_interleave(2, 1), slope)
    monkeypatch.setattr(backward, "HELD", 4 * 2 * KEYS * 5)
    for found, expected in zip(gradients(scores, v, attention.output(scores, v), slope), want, strict=True):
        torch.testing.assert_close(found, expected)


def test_no_piece_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case("causal", queries=QUERIES, keys=KEYS, softcap=5.0)
    seen: list[int] = []
    whole = backward._piece
    monkeypatch.setattr(backward, "HELD", 4 * 2 * KEYS * 5)
    monkeypatch.setattr(backward, "_piece", lambda s, v: (seen.append(s.q.shape[2] * s.k.shape[2]), whole(s, v))[1])
    q = case.q.requires_grad_()
    attention.output(replace(case, q=q), case.v).sum().backward()
    assert max(seen) <= 5 * KEYS and len(seen) == 14, "seven pieces, each computed again in the backward pass"
