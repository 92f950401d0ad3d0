"""The sink experiment: its metric against dense maps, its texts, its arms, and its direction in a short run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp import HeadscopeError, trace
from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.experiment import run_experiment
from headscope.interp.laboratory.experiments.sink_emergence import ARMS, Arm, SinkEmergence, next_token_loss
from headscope.interp.laboratory.sinks.measures import received, sink_rates, sink_statistics
from headscope.interp.laboratory.sinks.text import BEGIN, Text, windows
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.variants import VARIANTS

SMALL = {"vocabulary": 11, "layers": 1, "heads": 2, "width": 8, "hidden": 8, "context": 9, "positions": "none"}


def first_layer(name: str) -> tuple[Decoder, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A decoder, token ids, and the first layer's queries and keys (batch, head, position, d_head)."""
    model = Decoder(Shape(**SMALL), VARIANTS[name])
    with torch.no_grad():
        for parameter in model.layers[0].attention.parameters():
            parameter.normal_()
        ids = torch.randint(11, (3, 9))
        x = model.layers[0].before_attention(model.embed(ids))
        q, k = (
            f(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for f in (model.layers[0].attention.q, model.layers[0].attention.k)
        )
    return model, ids, q, k


def columns(weights: torch.Tensor) -> torch.Tensor:
    """alpha_k of maps (example, head, query, key), every key."""
    return torch.stack([weights[..., k:, k].mean(-1) for k in range(weights.shape[-1])], -1)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "kernel_identity"])
def test_alpha_is_the_authors(name: str) -> None:
    model, ids, q, k = first_layer(name)
    s = q @ k.mT / 2
    w = {"softmax": s.exp(), "sigmoid": s.sigmoid(), "kernel_identity": s.abs()}[name].tril()
    with torch.no_grad(), trace(model, sink_statistics(4, 9)) as tracer:
        model(ids)
    alpha = received(tracer.record, halves=VARIANTS[name].maps == 2)
    assert alpha.shape == (3, 1, 2, 5)
    # some dozen roundings of 2^-24 of shares
    np.testing.assert_allclose(alpha[:, 0, :, :4], columns(w / w.sum(-1, keepdim=True))[..., :4], atol=2e-5)
    np.testing.assert_allclose(alpha[..., 4], 0, atol=2e-5)


def test_a_learned_key_is_told_apart() -> None:
    model, ids, q, k = first_layer("key_bias")
    extra = model.layers[0].attention.extra_key
    s = torch.cat([q @ extra.mT, q @ k.mT], -1) / 2
    p = s.masked_fill(~torch.ones(9, 10).tril(1).bool(), -torch.inf).softmax(-1)
    with torch.no_grad(), trace(model, sink_statistics(4, 9)) as tracer:
        model(ids)
    alpha = received(tracer.record)[:, 0]
    np.testing.assert_allclose(alpha[..., :4], columns(p[..., 1:].detach())[..., :4], atol=2e-5)
    np.testing.assert_allclose(alpha[..., 4], p[..., 0].mean(-1).detach(), atol=2e-5)


def test_rates_count_what_is_strictly_above() -> None:
    alpha = np.array([[[[0.3, 0.31], [0.9, 0.0]]], [[[0.5, 0.2], [0.1, 0.1]]]])
    assert sink_rates(alpha, 0.3).tolist() == [50.0, 25.0]


def test_texts() -> None:
    text = Text.load("prose")
    assert len(text.held) == 46_401 and 0.89 < len(text.train) / (len(text.train) + len(text.held)) < 0.91
    assert int(text.train.min()) > BEGIN and len(Text.load("prose", 0.02).train) == len(text.train) // 50
    drawn = windows(text.train, 50, 64, generator(0, 3), begin=True)
    assert drawn.shape == (50, 64) and (drawn[:, 0] == BEGIN).all() and (drawn[:, 1:] != BEGIN).all()
    assert torch.equal(drawn, windows(text.train, 50, 64, generator(0, 3), begin=True))
    assert (windows(torch.arange(64), 5, 64, generator(0, 0), begin=False) == torch.arange(64)).all()
    assert b"def " in bytes(Text.load("python").train[:500_000].tolist())
    with pytest.raises(HeadscopeError, match="no text 'poems'"):
        Text.load("poems")


def test_arms() -> None:
    experiment = SinkEmergence(context=12)
    text = Text.load("prose").train
    assert (experiment.drawn(text, 7, 0, 0, ARMS["fixed"])[:, 3] == 1).all()
    assert (experiment.drawn(text, 7, 0, 0, ARMS["no_beginning"]) != BEGIN).all()
    drawn = experiment.drawn(text, 6, 0, 0, ARMS["softmax"])
    assert torch.equal(drawn[::2, 6:], drawn[::2, :6]) and not (drawn[1::2, 6:] == drawn[1::2, :6]).all(-1).any()
    assert not (experiment.drawn(text, 6, 0, -1, ARMS["softmax"])[:, 1:] == BEGIN).any()
    seen = Arm(prefix=4).mask.tile(torch.arange(9), torch.arange(9))
    assert seen is not None and torch.equal(seen[0, 0], torch.ones(9, 9).tril().bool() | (torch.arange(9) < 4))
    with pytest.raises(HeadscopeError, match="no arm 'soft'; choose softmax"):
        run_experiment(SinkEmergence(arms="soft"), seeds=(0,), device="cpu")


def test_loss_leaves_the_prefix_out() -> None:
    model = Decoder(Shape(**SMALL), VARIANTS["softmax"])
    ids = torch.randint(11, (3, 9))
    each = -model(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(next_token_loss(model, ids), each.mean())
    assert torch.allclose(next_token_loss(model, ids, 4), each[:, 3:].mean())
