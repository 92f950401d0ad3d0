"""Redistribution against the pattern edited entry by entry; a key bias against weights rescaled and renormalised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headscope.kernels import attention, reference
from headscope.kernels.checks import MASKS, Case, random_case
from headscope.kernels.edits import redistribute
from headscope.kernels.request import Request

KEYS = torch.tensor([0, 3, 17])


def edited(p: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    out = p.clone()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in p.shape[:3])).tolist():
        row, a = p[tuple(index)], float(keep[index[1]])
        named, whole = row[keys].sum(), row.sum()
        if whole - named > 1e-6 * whole:
            a = min(a, float(whole / named)) if named > 0 else a
            changed = row * (whole - a * named) / (whole - named)
            changed[keys] = a * row[keys]
            out[tuple(index)] = changed.clamp(min=0)  # a share of exactly nothing may round below it
    return out


def request(case: Case) -> Request:
    features = torch.randn(case.k.shape[0], case.k.shape[2], 2, generator=torch.Generator().manual_seed(3))
    return Request(output=True, entropy=True, linear=features, distance=True)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": True, "bias": True}], ids=["plain", "all three"])
def test_moved_mass_is_the_dense_edit(kind: str, options: dict) -> None:
    case = random_case(kind, batch=2, kv_heads=1, queries=12, keys=20, **options)
    keep = torch.tensor([0.0, 2.5])
    call = {name: getattr(case, name) for name in ("mask", "scale", "softcap", "sinks", "bias")}
    got = redistribute(case.q, case.k, case.v, KEYS, keep, request=request(case), **call)
    p = edited(case.pattern(), KEYS, keep)
    want = reference.reduce(
        case._scores(torch.float64), p, case.v.double(), mask=case.mask, sinks=case.sinks, request=request(case)
    )
    for name in ("output", "entropy", "linear", "distance"):
        assert (getattr(got, name) - getattr(want, name)).abs().max() < 2e-4, name


def test_keeping_everything_changes_nothing() -> None:
    case = random_case("causal", queries=20, keys=20)
    call = {name: getattr(case, name) for name in ("mask", "scale", "softcap", "sinks", "bias")}
    got = redistribute(case.q, case.k, case.v, KEYS, 1.0, request=request(case), **call)
    same = case.run(attention.attend, request(case))
    for name in ("output", "entropy", "linear", "distance"):
        assert torch.allclose(getattr(got, name), getattr(same, name), atol=1e-5), name


def test_what_cannot_follow_an_edit_is_refused() -> None:
    case = random_case("causal", queries=5, keys=20)
    with pytest.raises(ValueError, match="redistribution"):
        redistribute(case.q, case.k, case.v, KEYS, 0.5, mask=case.mask, scale=1.0, request=Request(top=3))


def test_a_key_bias_rescales_and_renormalises() -> None:
    case = random_case("causal", queries=20, keys=20)
    weight = torch.ones(20)
    weight[KEYS] = 0.25
    p = case.pattern() * weight
    p = p / p.sum(-1, keepdim=True)
    got = replace(case, bias=weight.log()[None, None]).run(attention.attend, Request(entropy=True, key_sum=True))
    assert got.entropy is not None and got.key_sum is not None
    assert (got.entropy - torch.special.entr(p).sum(-1)).abs().max() < 1e-5
    assert (got.key_sum - p.sum(2)).abs().max() < 1e-5
