"""What each variant adds to the stream, against its formula written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu, softplus

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants import VARIANTS
from headscope.kernels.masks import Mask

HEADS, D, LENGTH = 2, 4, 20
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def split(x: Tensor, d: int) -> Tensor:
    """(batch, position, n * d) to (batch, n, position, d)."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def softmax(s: Tensor, seen: Tensor = CAUSAL) -> Tensor:
    return s.masked_fill(~seen, -torch.inf).softmax(-1)


def weighted(w: Callable[[Tensor], Tensor], normed: bool) -> Callable[..., Tensor]:
    def z(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows = w(q @ k.mT / D**0.5) * CAUSAL
        return (rows / rows.sum(-1, keepdim=True) if normed else rows) @ v

    return z


def kernel(phi: Callable[[Any, Tensor], Tensor], signed: bool, normed: bool) -> Callable[..., Tensor]:
    def z(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows = phi(a, q) @ phi(a, k).mT / D**0.5 * CAUSAL
        total = rows.sum(-1, keepdim=True)
        by = (total.abs().clamp(min=1) if signed else total) if normed else 1
        return rows / by @ v

    return z


def with_extra(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = torch.cat([(q * a.extra_key).sum(-1, keepdim=True), q @ k.mT], -1) / D**0.5
    p = softmax(s, torch.cat([torch.ones(LENGTH, 1).bool(), CAUSAL], 1))
    return p[..., 1:] @ v + (0 if a.extra_value is None else p[..., :1] * a.extra_value)


def differential(
    a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, noise: Callable[[int], int] | None = None
) -> Tensor:
    first = 0.8 - 0.6 * exp(-0.3 * a.layer_idx)
    b = a.parts
    share = (b[0, 0] @ b[0, 1]).exp() - (b[1, 0] @ b[1, 1]).exp() + first
    z = []
    for head in range(HEADS):
        one, other = (2 * head, 2 * head + 1) if noise is None else (head, HEADS)
        p = softmax(q[:, one] @ k[:, one].mT / (D / 2) ** 0.5) - share * softmax(
            q[:, other] @ k[:, other].mT / (D / 2) ** 0.5
        )
        u = p @ v[:, head]
        z.append((1 - first) * a.norm.weight * u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    return torch.stack(z, 1)


def grouped(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return differential(a, q, k, v, x, noise=lambda head: HEADS)


def affine(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    scale, even = ((x @ f.weight.T).mT[..., None] for f in (a.scale, a.even))
    n = CAUSAL.sum(-1, keepdim=True)
    return (2 * scale.sigmoid() * softmax(q @ k.mT / D**0.5) + even.tanh() * CAUSAL / n) @ v


def selective(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    of_query, of_value = ((x @ f.weight.T).tanh().mT[..., None] for f in (a.of_query, a.of_value))
    n = torch.arange(1, LENGTH + 1, dtype=x.dtype)[:, None]
    t = of_query + 1 + a.by_position.sigmoid()[..., None] * n.log()
    return softmax(t * (q @ k.mT) / D**0.5) @ ((1 + of_value) * v)


def reweighted(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    n = CAUSAL.sum(-1, keepdim=True)
    first = softplus(log(D) * n.log() * (q @ k.mT) / D**0.5) * CAUSAL
    w = (n * first / first.sum(-1, keepdim=True) - 1).clamp(min=1e-6) ** 3 * CAUSAL
    return w / w.sum(-1, keepdim=True) @ v


def triangles(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = q @ k.mT / (D / 2) ** 0.5
    back, ahead = softmax(s[:, ::2]), softmax(s[:, 1::2], CAUSAL.T)
    return torch.cat([back @ v[..., : D // 2], ahead @ v[..., D // 2 :]], -1)


def landmark(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    marks, out = split(x @ a.landmark.weight.T, D), torch.zeros_like(v)
    for i in range(LENGTH):
        own = i // 8 * 8
        near = torch.cat([k[:, :, own : i + 1], marks[:, :, 7:own:8]], 2)
        p = (q[:, :, i : i + 1] @ near.mT / D**0.5).softmax(-1)
        out[:, :, i] = (p[..., : i + 1 - own] @ v[:, :, own : i + 1])[:, :, 0]
        for block in range(own // 8):
            at = slice(8 * block, 8 * block + 8)
            within = (q[:, :, i : i + 1] @ k[:, :, at].mT / D**0.5).softmax(-1)
            out[:, :, i] += (p[..., i + 1 - own + block, None] * within @ v[:, :, at])[:, :, 0]
    return out


def core_context(a: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for i in range(LENGTH):
        near = max(0, i // 8 - 1)
        keys, values = [k[:, :, 8 * near : i + 1]], [v[:, :, 8 * near : i + 1]]
        for group in range(near):
            at = slice(8 * group, 8 * group + 8)
            share = (q[:, :, at][:, :, -1:] @ k[:, :, at].mT / D**0.5).softmax(-1)
            keys.append(share @ k[:, :, at])
            values.append(share @ v[:, :, at])
        p = (q[:, :, i : i + 1] @ torch.cat(keys, 2).mT / D**0.5).softmax(-1)
        out[:, :, i] = (p @ torch.cat(values, 2))[:, :, 0]
    return out


def of_positions(a: Any, q: Any, k: Any, v: Tensor, x: Tensor) -> Tensor:
    q, k = a.of_positions[:, :, :LENGTH]
    return softmax(q @ k.mT / D**0.5) @ v


PHI = {
    "elu": lambda a, x: elu(x) + 1,
    "identity": lambda a, x: x,
    "mlp": lambda a, x: (x @ a.phi[0]).relu() @ a.phi[1],
}
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda a, q, k, v, x: softmax(q @ k.mT / D**0.5) @ v,
    "key_bias": with_extra,
    "key_value_bias": with_extra,
    "value_bias": lambda a, q, k, v, x: softmax(q @ k.mT / D**0.5) @ v + a.extra_value,
    "differential": differential,
    "grouped_differential": grouped,
    "shared_differential": differential,
    "affine": affine,
    "selective": selective,
    "softplus": reweighted,
    "dual_triangle": triangles,
    "landmark": landmark,
    "core_context": core_context,
    "fixed_scores": of_positions,
    "random_scores": of_positions,
    "no_mixing": lambda a, q, k, v, x: v,
}
for normed in (False, True):
    ending = "_normed" if normed else ""
    FORMULAS["sigmoid" + ending] = weighted(torch.sigmoid, normed)
    FORMULAS["elu" + ending] = weighted(lambda s: elu(s) + 1, normed)
    FORMULAS |= {f"kernel_{phi}{ending}": kernel(PHI[phi], phi != "elu", normed) for phi in PHI}


def projected(a: Any, project: Any, x: Tensor) -> Tensor | None:
    """Queries or keys by the layer's own matrices, written out."""
    if project is None:
        return None
    if hasattr(project, "base"):
        update = split(x @ project.down.weight.T @ project.up.weight.T, a.d_head)
        return split(x @ project.base.weight.T, a.d_head).repeat_interleave(2, 1) + update
    return split(x @ project.weight.T, a.d_head)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_it_is_its_formula(name: str) -> None:
    mask = Mask.full() if VARIANTS[name].both_ways else Mask.causal()
    shape = Shape(heads=HEADS, width=HEADS * D, context=LENGTH + 3, positions="none", mask=mask)
    attention: Any = VARIANTS[name](shape, 2).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
        x = torch.randn(2, LENGTH, HEADS * D, dtype=torch.float64)
        q, k = (projected(attention, getattr(attention, each, None), x) for each in "qk")
        v = split(x @ attention.v.weight.T, D)
        z = FORMULAS[name](attention, q, k, v, x)
        found = attention(x)
    assert torch.allclose(
        attention.out(z.transpose(1, 2).flatten(2)), found, rtol=1e-9, atol=1e-9 * float(found.abs().max())
    )
    with torch.enable_grad():  # what training computes
        assert torch.allclose(attention(x), found, rtol=1e-9, atol=1e-9 * float(found.abs().max()))


@pytest.mark.parametrize("name", ["landmark", "core_context"])
def test_a_text_shorter_than_a_block_is_read_as_by_softmax(name: str) -> None:
    shape = Shape(heads=HEADS, width=HEADS * D, context=LENGTH)
    one, other = VARIANTS[name](shape, 0), VARIANTS["softmax"](shape, 0)
    other.load_state_dict(one.state_dict(), strict=False)
    x = torch.randn(2, 5, HEADS * D)
    assert torch.allclose(one(x), other(x), atol=1e-6)  # the same sums of five terms of size 1
