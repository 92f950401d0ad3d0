"""In-context classification: the law of its sequences, the network written out, its measures by hand, and the jump."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from headscope.interp import HeadscopeError
from headscope.interp.laboratory.abrupt_icl.data import Batch, Law, World
from headscope.interp.laboratory.abrupt_icl.induction import fitted, induction_head
from headscope.interp.laboratory.abrupt_icl.measures import context_mass, jump, progress
from headscope.interp.laboratory.abrupt_icl.model import Classifier
from headscope.interp.laboratory.experiment import run_experiment
from headscope.interp.laboratory.experiments.abrupt_icl import AbruptICL
from headscope.interp.laboratory.training import generator

LAW = Law(classes=32, labels=16, pairs=4, burst=2, noise=0.0, positions=12, dimensions=6)


def drawn(law: Law, count: int = 200, **more: bool) -> tuple[World, Batch]:
    world = World(law, 0)
    return world, world.draw(law, count, generator(0, 1), **more)


def read_back(world: World, law: Law, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which known class every item is, and which label every label row shows, by the rows alone."""
    content = batch.tokens[..., law.positions :]
    item = torch.cdist(content[:, 0::2], world.classes[None]).argmin(-1)
    label = torch.cdist(content[:, 1::2], world.labels[None]).argmin(-1)
    return item, label


def test_bursty_sequences() -> None:
    world, batch = drawn(LAW)
    item, label = read_back(world, LAW, batch)
    assert batch.tokens.shape == (200, 9, 18)
    assert torch.equal(item[:, :-1] % 16, label) and torch.equal(label, batch.context)
    assert torch.equal(item[:, -1] % 16, batch.label) and torch.equal(item[:, :-1] == item[:, -1:], batch.same)
    assert (batch.same.sum(1) == 2).all()  # each class twice
    assert all(len(set(row.tolist())) == 2 for row in label)  # of different labels
    assert len(item.unique()) == 32  # every class occurs: 1 - 32 (1 - 1 / 16)^200 of the time, 0.9999
    place = batch.tokens[..., :12]
    start = place[:, 0].argmax(-1)
    assert torch.equal(place.argmax(-1), start[:, None] + torch.arange(9)) and (place.sum(-1) == 1).all()
    assert set(start.tolist()) == {0, 1, 2, 3}


def test_sequences_that_are_not_bursty_follow_the_skew() -> None:
    law = replace(LAW, burst=0, skew=1.0)
    world, batch = drawn(law, 2_000)
    item, _ = read_back(world, law, batch)
    share = torch.bincount(item.flatten(), minlength=32) / item.numel()
    wanted = 1 / torch.arange(1, 33)
    # 10,000 draws: a standard error of at most 0.005
    assert torch.allclose(share, wanted / wanted.sum(), atol=0.025)
    some = replace(LAW, bursty=0.5)
    twice = (drawn(some, 2_000)[1].same.sum(1) == 2).double().mean()
    assert 0.45 < float(twice) < 0.6  # half, and the few that draw the target twice by chance; standard error 0.011


def test_novel_classes_are_new_and_flipped_labels_the_next() -> None:
    world, batch = drawn(LAW.only_novel())
    content = batch.tokens[:, 0::2, 12:]
    assert torch.cdist(content, world.classes[None]).amin() > 0.01  # noise 0: known ones would lie on a class
    assert torch.equal(batch.same, (torch.cdist(content[:, :-1], content[:, -1:]) < 1e-3)[..., 0])
    assert (batch.context[batch.same] == batch.label[:, None].expand(-1, 4)[batch.same]).all()
    item, label = read_back(world, LAW, drawn(LAW, flipped=True)[1])
    assert torch.equal((item[:, :-1] + 1) % 16, label)
    assert torch.equal((item[:, -1] + 1) % 16, drawn(LAW, flipped=True)[1].label)
    assert torch.equal(drawn(LAW.only_novel())[1].tokens, drawn(LAW.only_novel(), flipped=True)[1].tokens)


def test_noise_keeps_the_size() -> None:
    law = replace(LAW, noise=3.0, dimensions=100, positions=9)
    _, batch = drawn(law, 2_000)
    size = batch.tokens[:, 0::2, 9:].square().sum(-1)
    assert abs(float(size.mean()) - 1) < 0.1  # classes and noise of length 1 on average; 32 classes: 0.02 / 10


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"classes": 40}, "evenly"),
        ({"burst": 3}, "divide"),
        ({"burst": 4}, "smaller"),
        ({"positions": 8}, "do not fit"),
    ],
)
def test_laws_that_do_not_go_together(bad: dict[str, int], said: str) -> None:
    with pytest.raises(HeadscopeError, match=said):
        replace(LAW, **bad)
    with pytest.raises(HeadscopeError, match=said):
        AbruptICL(**{"classes": 32, "labels": 16, "burst": 2, "positions": 12, "few": ()} | bad)


def patterns(model: Classifier, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The network written out: logits, and each layer's pattern (example, query, key)."""
    x, found = tokens, []
    for layer in model.layers:
        a = layer.attention
        s = (x @ a.q) @ (x @ a.k).transpose(1, 2)
        p = s.masked_fill(torch.ones(s.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)
        x, found = x + p @ (x @ a.v), [*found, p]
    for dense in model.dense:
        x = (x @ dense.weight + dense.bias).clamp(min=0)
    return x[:, -1] @ model.read, found


def test_the_network_and_its_measures() -> None:
    torch.manual_seed(0)
    model = Classifier(LAW).double()
    _, batch = drawn(LAW, 6)
    batch = replace(batch, tokens=batch.tokens.double())
    logits, (first, second) = patterns(model, batch.tokens)
    assert torch.allclose(model(batch.tokens), logits, atol=1e-10)  # rounding 1e-16 of sums of size 10, a few hundred
    assert model.dense[0].bias.shape == (1,)
    found = progress(model, batch)
    assert found["ila1"] == pytest.approx(first[:, [1, 3, 5, 7], [0, 2, 4, 6]].mean().item(), abs=1e-6)
    labels = second[:, 8, 1::2]
    assert found["tla2"] == pytest.approx(labels.sum(1).mean().item(), abs=1e-6)
    right = batch.context == batch.label[:, None]
    assert 0 < found["tila2"] == pytest.approx((labels * right).sum(1).mean().item(), abs=1e-6)
    p, mass = logits.softmax(-1), 0.0
    for one in range(6):
        mass += sum(p[one, label].item() for label in set(batch.context[one].tolist())) / 6
    assert found["cla"] == pytest.approx(mass, abs=1e-6) == context_mass(logits, batch.context)


def test_a_step_takes_decay_whatever_the_rate() -> None:
    """The authors' update, p <- (1 - decay) p - rate gradient."""
    rate, decay = 0.2, 0.01
    torch.manual_seed(0)
    model = Classifier(LAW).double()
    _, batch = drawn(LAW, 5)
    cross_entropy(model(batch.tokens.double()), batch.label).backward()
    wanted = [(1 - decay) * p.detach() - rate * p.grad for p in model.parameters()]
    torch.optim.SGD(model.parameters(), rate, weight_decay=decay / rate).step()
    assert all(torch.allclose(p, w, atol=1e-14) for p, w in zip(model.parameters(), wanted, strict=True))


def test_a_jump_is_found() -> None:
    found = jump([0, 100, 200, 300], [0.1, 0.1, 0.5, 0.3])
    assert found["height"] == pytest.approx(0.4) and found["half"] == 150 and found["width"] == pytest.approx(60 / 150)
    assert jump([0, 10], [0.0, 1.0])["width"] == pytest.approx(1.2)
    assert math.isnan(jump([0, 1], [0.5, 0.4])["half"])
    late = jump([0, 10, 20], [0.0, 0.5, 1.0], floor=0.5)
    assert late["height"] == 0.5 and late["half"] == 15 and late["width"] == pytest.approx(6 / 15)


def test_the_head_of_two_parameters() -> None:
    same = torch.tensor([[True, False], [False, True]])
    none = induction_head(0.0, 0.0, same)  # everything even: rows see 2, 4, and 5 rows
    assert none["ila1"] == pytest.approx((1 / 2 + 1 / 4) / 2) and none["tla2"] == pytest.approx(2 / 5)
    assert none["tila2"] == pytest.approx(1 / 5)
    sharp = induction_head(40.0, 40.0, same)
    assert all(value == pytest.approx(1, abs=1e-12) for value in sharp.values())
    # beta alone: nothing in layer 2 follows
    assert induction_head(40.0, 0.0, same)["tla2"] == pytest.approx(2 / 5)
    b, a = math.e**2, 3.0  # row 0 moves nothing; row 1 has taken pair 0 with b of b + 1, the rest evenly
    second = (a * torch.tensor([0, b / (b + 1), 1 / (b + 2), 1 / (b + 3), 1 / (b + 4)])).softmax(-1)
    assert induction_head(2.0, a, same[:1])["tila2"] == pytest.approx(float(second[1]), abs=1e-6)


def test_parameters_come_back() -> None:
    same = torch.eye(3).bool()
    rows = [induction_head(beta, alpha, same) for beta, alpha in ((0.5, 1.0), (3.0, 6.0), (6.0, 12.0))]
    found = fitted(rows, same)
    assert found["beta"] == pytest.approx([0.5, 3.0, 6.0], abs=1e-3)
    assert found["alpha"] == pytest.approx([1.0, 6.0, 12.0], abs=1e-3) and max(found["error"]) < 1e-6
    odd = fitted([{"ila1": 0.9, "tla2": 0.1, "tila2": 0.1}], same)  # no such head looks away from labels alone
    assert odd["error"][0] > 0.05


@pytest.mark.slow
def test_it_learns_in_context_or_in_weights() -> None:
    small = replace(AbruptICL().quick(), rate=0.2, steps=500, few=(16,), tests=200, every=125)
    found = run_experiment(small, seeds=(0,), device="cpu")
    numbers = {name: float(value[0]) for name, value in found.numbers.items()}
    assert numbers["ic_base"] > 0.7 and numbers["ic2_base"] > 0.7  # 0.5: choosing among the context's labels
    assert numbers["iw_K16"] > 0.9 and numbers["ic_K16"] < 0.3
    assert numbers["cla_half_base"] < numbers["ic_half_base"] and numbers["tla2_half_base"] < numbers["ic_half_base"]
    assert numbers["ila1_height_base"] > 0.25 and numbers["ila1_height_K16"] < 0.1
    said = found.verdicts().set_index("claim")["held"]
    assert said["Many classes favour the context (IC)"] == said["Few classes favour the weights (IW)"] == "yes"
    assert found.curve("base", "alpha")["step"].tolist() == [0, 125, 250, 375, 500]
