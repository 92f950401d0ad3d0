"""Every variant of the bench: a decoder with it trains, is traced, and pads nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from headscope.interp import HeadscopeError, trace
from headscope.interp.laboratory.decoder import POSITIONS, Decoder, Shape
from headscope.interp.laboratory.variants import VARIANTS
from headscope.kernels.masks import Mask

SMALL = {"vocabulary": 11, "layers": 2, "heads": 2, "width": 16, "hidden": 24, "context": 20}
CASES = [(name, "rope") for name in VARIANTS] + [("softmax", other) for other in POSITIONS[1:]] + [("elu", "alibi")]


def shape(name: str, **more: object) -> Shape:
    """The small shape, with the mask that the variant takes."""
    return Shape(**(SMALL | {"mask": Mask.full() if VARIANTS[name].both_ways else Mask.causal()} | more))


@pytest.mark.parametrize(("name", "positions"), CASES)
def test_tracing_gives_the_same_logits_and_later_tokens_change_nothing(name: str, positions: str) -> None:
    model = Decoder(shape(name, positions=positions), VARIANTS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # patterns far from uniform
        ids = torch.randint(11, (3, 20))
        plain = model(ids)
        with trace(model, ["entropy", "sink_mass"]) as tracer:
            traced = model(ids)
        # sums of 20 terms in another order, through two layers: some hundred roundings of 2^-24 of numbers of size 10
        assert torch.allclose(traced, plain, atol=2e-4 * float(plain.abs().max()))
        assert tracer.record["entropy"].shape == (3, 2, 2 * VARIANTS[name].maps, 20)
        ids[:, -1] = (ids[:, -1] + 1) % 11
        same = torch.allclose(model(ids)[:, :-1], plain[:, :-1], atol=2e-4 * float(plain.abs().max()))
        assert same != VARIANTS[name].both_ways


@pytest.mark.parametrize("name", list(VARIANTS))
def test_it_learns(name: str) -> None:
    """To say the token before: a variant without a gradient cannot, nor can one that mixes no tokens."""
    model = Decoder(shape(name, context=12, layers=1), VARIANTS[name])
    adam = torch.optim.Adam(model.parameters(), 5e-2)
    losses = []
    for _ in range(16):
        ids = torch.randint(11, (16, 12))
        loss = cross_entropy(model(ids)[:, 1:].flatten(0, 1), ids[:, :-1].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert (losses[-1] < 2.36) == (name != "no_mixing")  # log 11 = 2.398 without a token before; of 176 tokens
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in model.parameters()) == (name != "random_scores")


@pytest.mark.parametrize("name", list(VARIANTS))
def test_steep_scores_have_finite_losses_and_gradients(name: str) -> None:
    """Scores of hundreds, as a model may have that is trained at a large rate: weights underflow, gradients do not."""
    model = Decoder(shape(name), VARIANTS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    ids = torch.randint(11, (3, 20))
    loss = cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(HeadscopeError, match="width 18"):
        Shape(width=18, heads=2)
    with pytest.raises(HeadscopeError, match="no positions 'sine'"):
        Shape(positions="sine")
    with pytest.raises(HeadscopeError, match="differential takes 3 of a head's 6 dimensions"):
        VARIANTS["differential"](Shape(width=12, heads=2), 0)
    with pytest.raises(HeadscopeError, match="reads a text both ways"):
        VARIANTS["dual_triangle"](Shape(), 0)
    with pytest.raises(HeadscopeError, match="landmark reads whole blocks"):
        VARIANTS["landmark"](Shape(mask=Mask.causal(window=5)), 0)
    with pytest.raises(HeadscopeError, match="fixed_scores has scores of 20 tokens, not of 21"):
        Decoder(shape("fixed_scores"), VARIANTS["fixed_scores"])(torch.zeros(1, 21, dtype=torch.long))
