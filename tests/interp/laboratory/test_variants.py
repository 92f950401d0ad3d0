"""Every variant of the bench: a decoder with it trains, is traced, and pads nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from headscope.interp import HeadscopeError, trace
from headscope.interp.laboratory.decoder import POSITIONS, Decoder, Shape
from headscope.interp.laboratory.variants import VARIANTS

SMALL = {"vocabulary": 11, "layers": 2, "heads": 2, "width": 16, "hidden": 24, "context": 12}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", list(VARIANTS))
def test_tracing_gives_the_same_logits_and_later_tokens_change_nothing(name: str, positions: str) -> None:
    model = Decoder(Shape(**SMALL, positions=positions), VARIANTS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # patterns far from uniform
        ids = torch.randint(11, (3, 12))
        plain = model(ids)
        with trace(model, ["entropy", "sink_mass"]) as tracer:
            traced = model(ids)
        # sums of 12 terms in another order, through two layers: some hundred roundings of 2^-24 of numbers of size 10
        assert torch.allclose(traced, plain, atol=2e-4 * float(plain.abs().max()))
        assert tracer.record["entropy"].shape == (3, 2, 2 * VARIANTS[name].maps, 12)
        ids[:, -1] = (ids[:, -1] + 1) % 11
        assert torch.allclose(model(ids)[:, :-1], plain[:, :-1], atol=2e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_it_learns(name: str) -> None:
    """To say the token before: a variant without a gradient cannot."""
    model = Decoder(Shape(**SMALL), VARIANTS[name])
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        ids = torch.randint(11, (16, 12))
        loss = cross_entropy(model(ids)[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters())


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(HeadscopeError, match="width 18"):
        Shape(width=18, heads=2)
    with pytest.raises(HeadscopeError, match="no positions 'sine'"):
        Shape(positions="sine")
