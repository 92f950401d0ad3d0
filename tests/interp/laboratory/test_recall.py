"""The recall task and its measures, by hand, and the experiment on variants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from headscope.interp import HeadscopeError
from headscope.interp.attention.module import AttentionModule
from headscope.interp.laboratory.experiment import Bench
from headscope.interp.laboratory.experiments.variants import Variants
from headscope.interp.laboratory.recall.measures import measured
from headscope.interp.laboratory.recall.task import Recall
from headscope.interp.laboratory.training import generator
from headscope.kernels.masks import Mask

TASK = Recall(keys=6, values=3, pairs=4, blanks=5, queries=2)


def test_what_is_asked_for_stands_where_it_is_said() -> None:
    ids, values, at = TASK.draw(300, generator(0, 0))
    assert ids.shape == (300, 11) and values.shape == at.shape == (300, 2)
    text, questions = ids[:, :9], ids[:, 9:]
    assert ((text > 0).sum(-1) == 4).all() and (text <= 18).all()
    asked = questions - 19
    assert torch.equal(text.gather(1, at), 1 + asked * 3 + values)
    keys = [sorted(((row[row > 0] - 1) // 3).tolist()) for row in text]
    assert all(len(set(each)) == 4 for each in keys) and {key for each in keys for key in each} == set(range(6))
    assert set(at.flatten().tolist()) == set(range(9)) and set(values.flatten().tolist()) == {0, 1, 2}
    with pytest.raises(HeadscopeError, match="4 pairs need as many keys, not 3"):
        Recall(keys=3, pairs=4)


class Pointing(AttentionModule):
    """Two patterns a head, of scores that are given: (head * 2, query, key)."""

    share = 0.4

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__(2, 0)
        self.given = scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = torch.eye(x.shape[1]).expand(x.shape[0], 2, -1, -1)
        self.attend(self.given.expand(x.shape[0], -1, -1, -1), unit, unit, Mask.causal(), 1.0)
        return x


class Saying(nn.Module):
    """Logits that are given, beside attention that is given."""

    def __init__(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        super().__init__()
        layer = nn.Module()
        layer.attention = Pointing(scores)
        self.layers, self.logits = nn.ModuleList([layer]), logits

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.layers[0].attention(input_ids[..., None].float())
        return self.logits


def test_measures_by_hand() -> None:
    ids, values, at = TASK.draw(1, generator(0, 1))
    scores = torch.full((2, 11, 11), -100.0)
    scores[:, :, 0] = 0.0
    for question in range(2):  # first pattern: 0.8 on the pair, 0.2 on the first token; second: half on each
        for pattern, mass in enumerate((0.8, 0.5)):
            scores[pattern, 9 + question, at[0, question]] = float(np.log(mass / (1 - mass)))
    at_first = (at == 0).double()
    logits = torch.zeros(1, 11, 20)
    logits[0, 9, values[0, 0]] = 50.0
    logits[0, 10, (values[0, 1] + 1) % 3] = 50.0
    found = measured(Saying(scores, logits), TASK, (ids, values, at))
    assert not at_first.any(), "another seed: the pair stands where the rest goes"
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(25.0)
    assert found["noise"] == pytest.approx(0.2, abs=1e-5) and found["noise_mean"] == pytest.approx(0.35, abs=1e-5)
    assert found["sink_mass"] == pytest.approx(0.35, abs=1e-5)
    assert found["noise_difference"] == pytest.approx(1 - (0.8 - 0.4 * 0.5) / 0.6, abs=1e-5)
    spread = [-(0.8 * np.log(0.8) + 0.2 * np.log(0.2)), np.log(2)]
    assert found["entropy"] == pytest.approx(np.mean(spread), abs=1e-5)
    gaps = [(1 - mass) * (9 + i) + mass * (9 + i - int(at[0, i])) for i in range(2) for mass in (0.8, 0.5)]
    assert found["distance"] == pytest.approx(np.mean(gaps), abs=1e-4)


SMALL = Variants(
    variants="softmax,no_mixing", positions="", keys=4, values=4, blanks=2, queries=2, width=32, batch=16, samples=64
)


def numbers_of(experiment: Variants) -> tuple[dict[str, NDArray[np.float64]], Bench]:
    bench = Bench(0, "cpu", None, {}, {})
    return {name: np.array([value]) for name, value in experiment.run(bench).items()}, bench


@pytest.mark.slow
def test_recall_is_learned_by_attention_and_not_without() -> None:
    experiment = replace(SMALL, steps=100)
    numbers, _ = numbers_of(experiment)
    assert numbers["softmax accuracy"][0] > 0.9 and numbers["softmax noise"][0] < 0.4
    assert numbers["no_mixing accuracy"][0] < 0.5
    claims = {claim.says: claim.held for claim in experiment.claims(numbers)}
    assert claims == {"no_mixing: cannot recall (chance 0.250)": True}


def test_lengths_and_differences() -> None:
    experiment = replace(SMALL, steps=1, variants="softmax,differential", positions="none,rope", times="1,3")
    numbers, bench = numbers_of(experiment)
    assert list(bench.curves) == ["softmax", "differential", "positions none", "positions rope"]
    assert numbers["none x3 distance"][0] > 2 * numbers["none x1 distance"][0]  # patterns are uniform still
    apart, spread = (numbers[f"none-rope head_distance{which}"][0] for which in ("", " unmatched"))
    assert 0 < apart <= spread < np.log(2)
    says = [claim.says for claim in experiment.claims(numbers)]
    assert says[0].startswith("differential: less noise") and says[1].startswith("NoPE goes further than rope")
