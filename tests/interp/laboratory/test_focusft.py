"""FocuSFT in small: the task's law, the mask written out, the inner loop against merged weights, and the measures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from headscope.interp import HeadscopeError
from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.experiment import run_experiment
from headscope.interp.laboratory.experiments.focusft import FocuSFT, flops
from headscope.interp.laboratory.focusft.conversations import DECOY, END, START, TRUE, Conversations, repeats
from headscope.interp.laboratory.focusft.inner import Inner, answer_loss
from headscope.interp.laboratory.focusft.measures import attention_shares, recall
from headscope.interp.laboratory.focusft.turns import Turned, seeing, turn_mask
from headscope.interp.laboratory.training import generator

TASK = Conversations(keys=5, values=6, noise=4, pairs=3, slots=7, turns=2, length=2)


@pytest.fixture
def model() -> Decoder:
    """Three layers, the upper two of which are adapted, in float64 and far from its first values."""
    torch.manual_seed(0)
    shape = Shape(vocabulary=TASK.vocabulary, layers=3, heads=2, width=8, hidden=12, context=TASK.tokens)
    made = Decoder(shape, Turned).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)
    return made


def test_conversations_ask_for_what_the_context_holds() -> None:
    ids, answered = TASK.draw(50, generator(0, 0))
    assert ids.shape == answered.shape == (50, TASK.tokens) and int(ids.max()) < TASK.vocabulary == 19
    assert torch.equal(ids, TASK.draw(50, generator(0, 0))[0])
    for row, marks in zip(ids.tolist(), answered.tolist(), strict=True):
        slots = [row[1 + 4 * n : 5 + 4 * n] for n in range(7)]
        true, decoy = ({s[1]: s[2:] for s in slots if s[0] == kind} for kind in (TRUE, DECOY))
        assert row[0] == START and set(true) == set(decoy) and len(true) == 3 and all(4 <= key < 9 for key in true)
        assert all(9 <= word < 15 for value in [*true.values(), *decoy.values()] for word in value)
        assert sum(min(s) >= 15 for s in slots) == 1  # noise
        turns = [row[29 + 5 * n : 34 + 5 * n] for n in range(2)]
        assert len({turn[1] for turn in turns}) == 2
        assert all(turn == [TRUE, turn[1], *true[turn[1]], END] for turn in turns)
        assert marks == [False] * 31 + [True] * 3 + [False] * 2 + [True] * 3
    with pytest.raises(HeadscopeError, match="4 pairs of 16 keys, twice each in 7 slots"):
        Conversations(slots=7)


def test_texts_repeat_after_their_own_number_of_tokens() -> None:
    ids = repeats(40, 16, 1000, generator(0, 0))
    assert ids.shape == (40, 17) and (ids[:, 0] == START).all()
    periods = {next(n for n in range(1, 16) if torch.equal(row[n:], row[:-n])) for row in ids[:, 1:]}
    assert periods == set(range(2, 9))


def seen_by_hand(answered: list[bool]) -> Tensor:
    turn = [0]
    for one, other in zip(answered, answered[1:], strict=False):
        turn.append(turn[-1] + (one != other))
    count = range(len(answered))
    return torch.tensor(
        [[turn[k] < turn[q] or (turn[k] == turn[q] and (not answered[q] or k <= q)) for k in count] for q in count]
    )


def test_turns_see_earlier_turns() -> None:
    rows = [[0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1], [1] * 7, [0] * 7]
    answered = torch.tensor(rows).bool()
    at = torch.arange(7)
    found = turn_mask(answered).tile(at, at)
    assert found is not None and found.shape == (4, 1, 7, 7)
    for index, row in enumerate(answered.tolist()):
        assert torch.equal(found[index, 0], seen_by_hand(row))
    assert torch.equal(found[2, 0], torch.ones(7, 7).tril().bool()) and found[3].all()


def test_a_mask_is_seen_inside_its_block_alone(model: Decoder) -> None:
    ids, answered = TASK.draw(2, generator(0, 1))
    with torch.no_grad():
        causal = model(ids)
        with seeing(model, turn_mask(torch.ones_like(answered))):
            assert torch.allclose(model(ids), causal, atol=1e-9)
        with seeing(model, turn_mask(answered)):
            inside = model(ids)
        assert torch.equal(model(ids), causal) and not torch.allclose(inside[:, 0], causal[:, 0])
        ids[:, -1] = START  # the last answer's token: nobody before it sees it
        with seeing(model, turn_mask(answered)):
            assert torch.allclose(model(ids)[:, :-1], inside[:, :-1], atol=1e-9)


def by_merging(model: Decoder, ids: Tensor, answered: Tensor, fast: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The answers' loss with W + 2 b a in the place of every adapted W."""
    own = dict(model.named_parameters())
    merged = {name: own[name].detach() + 2 * b @ a for name, (a, b) in fast.items()}
    with seeing(model, turn_mask(answered)):
        logits = functional_call(model, {**{n: p.detach() for n, p in own.items()}, **merged}, (ids,))
    picked = [(logits[b, t - 1], ids[b, t]) for b, t in answered.nonzero().tolist()]
    return torch.stack([cross_entropy(row, target) for row, target in picked]).mean()


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_the_inner_loop_is_gradient_descent_on_merged_weights(model: Decoder, clip: float) -> None:
    ids, answered = TASK.draw(3, generator(0, 2))
    inner = Inner(rank=4, alpha=8.0, clip=clip)
    assert inner.first(3) == 1 and inner.first(28) == 18
    found = inner.adapt(model, ids, answered, turn_mask(answered), generator(1, 0))
    names = [f"layers.{layer}.{target}.weight" for layer in (1, 2) for target in ("gate", "up", "down")]
    first = {name: (one.a.detach().clone(), one.b.detach().clone()) for name, one in
             zip(names, inner.fresh(model, generator(1, 0)), strict=True)}  # fmt: skip
    for a, b in first.values():
        assert (b == 0).all() and a.abs().max() <= a.shape[1] ** -0.5 and a.std() > 0.4 * a.shape[1] ** -0.5
    fast, cut = first, 0
    for _ in range(2):
        fast = {name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in fast.items()}
        flat = [x for pair in fast.values() for x in pair]
        gradients = list(torch.autograd.grad(by_merging(model, ids, answered, fast), flat))
        cut += sum(float(g.norm()) > clip for g in gradients)
        steps = [
            x.detach() - g * min(1, clip / (float(g.norm()) + 1e-12)) for x, g in zip(flat, gradients, strict=True)
        ]
        fast = dict(zip(fast, zip(steps[::2], steps[1::2], strict=True), strict=True))
    assert (cut > 0) or clip == 1.0
    for name, one in zip(names, found, strict=True):
        for got, wanted in zip((one.a, one.b), fast[name], strict=True):
            assert torch.allclose(got, wanted, atol=1e-10), name
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    once = replace(inner, steps=1).adapt(model, ids, answered, turn_mask(answered), generator(1, 0))
    assert all(torch.equal(one.a, first[name][0]) for name, one in zip(names, once, strict=True))
    assert all(one.b.abs().max() > 0 for one in once)


def test_the_outer_step_takes_fast_weights_as_given(model: Decoder) -> None:
    """First order: the base's gradient is that at W + 2 b a, with b and a constants."""
    ids, answered = TASK.draw(3, generator(0, 3))
    inner = Inner(rank=4, alpha=8.0)
    fast = inner.adapt(model, ids, answered, turn_mask(answered), generator(1, 1))
    with seeing(model, turn_mask(answered)), inner.adapted(fast):
        answer_loss(model(ids), ids, answered).backward()
    merged = Decoder(model.shape, Turned).double()
    merged.load_state_dict(model.state_dict())
    with torch.no_grad():
        layers = [getattr(merged.layers[n], target) for n in (1, 2) for target in ("gate", "up", "down")]
        for layer, one in zip(layers, fast, strict=True):
            layer.weight += 2 * one.b @ one.a
    with seeing(merged, turn_mask(answered)):
        answer_loss(merged(ids), ids, answered).backward()
    for (name, got), wanted in zip(model.named_parameters(), merged.parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-10), name


def test_shares_of_uniform_attention_are_counted(model: Decoder) -> None:
    ids, answered = TASK.draw(4, generator(0, 4))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q.weight.zero_()
        causal = attention_shares(model, ids, answered, sinks=2)
        with seeing(model, turn_mask(answered)):
            turned = attention_shares(model, ids, answered, sinks=2)
    held = answered[0].tolist()
    counted = []
    for seen in (torch.ones(len(held), len(held)).tril().bool(), seen_by_hand(held)):
        rows = [seen[q] for q in range(len(held)) if held[q]]
        sink = np.mean([float(row[:2].sum() / row.sum()) for row in rows])
        context = np.mean([float((row[2:] & ~answered[0][2:]).sum() / row.sum()) for row in rows])
        counted.append({"sink": sink, "context": context})
    assert causal == pytest.approx(counted[0], abs=1e-6) and turned == pytest.approx(counted[1], abs=1e-6)


def test_recall_counts_words_and_not_the_end() -> None:
    ids, answered = TASK.draw(4, generator(0, 5))
    right = torch.nn.functional.one_hot(ids[:, 1:], TASK.vocabulary).double()
    right = torch.cat([right, right[:, :1]], 1)
    assert recall(lambda given: right, ids, answered) == 1
    wrong = right.clone()
    wrong[:, 30] = 0  # says START for the first word of four, which the row before it decides
    assert recall(lambda given: wrong, ids, answered) == pytest.approx(3 / 4)
    wrong[:, 32] = 0  # and for the end of the first answer
    assert recall(lambda given: wrong, ids, answered) == pytest.approx(3 / 4)


def test_operations_are_counted() -> None:
    """Backward, a linear layer takes twice as much as forward, attention five products (its scores anew) for two."""
    shape = Shape(vocabulary=TASK.vocabulary, layers=3, heads=2, width=8, hidden=12, context=TASK.tokens)
    made = Decoder(shape, Turned)
    ids, answered = TASK.draw(3, generator(0, 6))
    tokens, linear = 3 * TASK.tokens, 3 * (4 * 8 * 8 + 3 * 8 * 12) + 8 * TASK.vocabulary
    attention = 3 * 2 * 8 * 3 * TASK.tokens**2  # layers, two products, width, conversations
    found = flops(made, lambda m, step: answer_loss(m(ids), ids, answered))
    assert found == 2 * (3 * tokens * linear + 3.5 * attention)
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.slow
def test_the_experiment_in_small() -> None:
    small = replace(FocuSFT().quick(), pretraining=10, steps=5)
    found = run_experiment(small, seeds=(0,), device="cpu")
    numbers = {name: float(value[0]) for name, value in found.numbers.items()}
    assert numbers["cost of a step, mask"] == 1 < numbers["cost of a step, focusft"]
    steps = {label: rows[-1]["step"] for label, rows in found.outcomes[0]["curves"].items()}
    assert steps["mask"] == steps["focusft"] == 5
    assert steps["plain"] == round(5 * numbers["cost of a step, focusft"]) > 10
    for arm in ("plain", "mask", "focusft"):
        assert 0 < numbers[f"sink while it trains, {arm}"] + numbers[f"context while it trains, {arm}"] < 1
    assert numbers["sink, plain"] == numbers["sink while it trains, plain"]
    assert numbers["sink, focusft"] != numbers["sink while it trains, focusft"]
    learned = numbers["recall, plain"] > numbers["recall, before"]
    assert all((claim.held is not None) <= learned for claim in found.claims[1:])
    assert numbers["loss on fast weights, before"] < numbers["loss, before"] and found.claims[0].held
