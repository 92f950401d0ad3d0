"""A model that is written on AttentionModule is traced and edited as any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headscope.interp import HeadscopeError, trace
from headscope.interp.sites import is_attached, verify
from headscope.interp.statistics import SinkMass
from headscope.interventions import KnockOut, ScaleHeads, apply
from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit
from tests.interp.laboratory.conftest import Attention, Small


def weights(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """The pattern written out, (batch, head, query, key)."""
    q, k, _ = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    s = (1.5 * q @ k.transpose(2, 3)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return s.softmax(-1)


def test_statistics_are_those_of_its_pattern(small: Small) -> None:
    x = torch.randn(3, 9, 16)
    with torch.no_grad():
        plain = small(x)
        p = weights(small.layers[0].attention, x)
        with trace(small, ["entropy", SinkMass(first=1)]) as tracer:
            traced = small(x)
    record = tracer.record
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    # d_head 4, 9 keys: a dozen roundings of 2^-24 on numbers of size 1 to 3
    assert torch.allclose(torch.tensor(record["entropy"].to_numpy())[:, 0], entropy, atol=2e-6)
    assert torch.allclose(torch.tensor(record["sink_mass"].to_numpy())[:, 0], p[..., 0], atol=2e-6)
    assert torch.allclose(traced, plain, atol=2e-6)
    assert verify(small).passed


def test_edits_act_and_leave_nothing(small: Small) -> None:
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = small(x)
        with apply(small, ScaleHeads(heads="L1H2", factor=0.0)):
            assert is_attached(small)
            edited = small(x)
        out = small.layers[1].attention.out
        keep = out.weight.clone()
        out.weight[:, 8:12] = 0
        assert torch.allclose(edited, small(x), atol=1e-6)
        out.weight.copy_(keep)
        with (
            pytest.raises(HeadscopeError, match="head L5H0 does not exist"),
            apply(small, ScaleHeads(heads="L5H0", factor=0.0)),
        ):
            pass
    assert not is_attached(small)
    assert torch.equal(small(x), plain)


def test_an_edit_and_a_tracer_together(small: Small) -> None:
    x = torch.randn(2, 7, 16)
    with apply(small, KnockOut(heads="L0H1", span=(0, 1))), trace(small, SinkMass(first=1)) as tracer:
        small(x)
    sinks = tracer.record["sink_mass"].to_numpy()
    assert (sinks[:, 0, 1, 1:] == 0).all() and (sinks[:, 0, 0] > 0).all()


def test_after_an_exception_nothing_stays(small: Small) -> None:
    with pytest.raises(RuntimeError), trace(small, "entropy"):
        small(torch.randn(1, 3, 5))
    assert not is_attached(small) and not small.layers[0].attention.handlers
    assert not small._forward_hooks and not small._forward_pre_hooks


def test_scores_that_are_edited_have_the_dense_gradient() -> None:
    """Training and statistics go different ways: they give the same z."""
    attention = Attention(0)
    q, k, v = (torch.randn(2, 4, 6, 4, requires_grad=True) for _ in range(3))
    edit = ScoreEdit(lambda s, b, h, i, j: torch.nn.functional.logsigmoid(s))
    z = attention.attend(q, k, v, Mask.causal(), 1.5, score_edit=edit)
    w = (1.5 * q @ k.transpose(2, 3)).sigmoid().tril()
    assert torch.allclose(z, (w / w.sum(-1, keepdim=True)) @ v, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(z, attention.attend(q, k, v, Mask.causal(), 1.5, score_edit=edit), atol=1e-5)
    assert torch.autograd.grad(z.sum(), q)[0].abs().max() > 0


def test_a_module_of_another_layer_is_named() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Attention(0), Attention(0)])
    with pytest.raises(HeadscopeError, match="layer 1 was made with layer=0"), trace(model, "entropy"):
        pass
    assert not model._forward_hooks and not model._forward_pre_hooks and not is_attached(model)
    assert all(layer.where == "" and not layer.handlers for layer in model.layers)
