"""Scan and snap: the data's law, the model and its gradient against formulas, and every measure on a known case."""

from __future__ import annotations

import pytest
import torch

from headscope.interp import HeadscopeError, trace
from headscope.interp.laboratory import run_experiment
from headscope.interp.laboratory.experiments.scan_and_snap import ScanAndSnap
from headscope.interp.laboratory.scan_and_snap.data import Corpus
from headscope.interp.laboratory.scan_and_snap.measures import (
    composition,
    entropy,
    moved,
    predicted_gains,
    prediction_error,
    snap,
    speeds,
    summary,
)
from headscope.interp.laboratory.scan_and_snap.model import OneLayer
from headscope.interp.laboratory.training import generator

CORPUS = Corpus(last=2, following=2, common=3, distinct=4, length=9)


def test_the_law_of_the_authors_log() -> None:
    """figure_4.log: 34 tokens, the first class has common tokens 0 to 9, its own 10 to 19, last 30, next 32."""
    corpus = Corpus(last=2, following=1)
    chances = corpus.probabilities()
    assert corpus.vocabulary == 34 and corpus.queries.tolist() == [30, 31] and corpus.answers.tolist() == [32, 33]
    assert chances[0, :10].tolist() == pytest.approx([0.0645] * 10, abs=5e-5)
    logged = [0.0065, 0.0129, 0.0194, 0.0258, 0.0323, 0.0387, 0.0452, 0.0516, 0.0581, 0.0645]
    assert chances[0, 10:20].tolist() == pytest.approx(logged, abs=5.1e-5)
    assert chances[1, 20:30].tolist() == pytest.approx(logged, abs=5.1e-5) and chances[1, 10:20].sum() == 0


def test_sequences_follow_the_law() -> None:
    before, last, following = CORPUS.batch(4000, generator(0, 0))
    assert before.shape == (4000, 8)
    for n in range(4):
        chosen = following == CORPUS.answers[n]
        assert (last[chosen] == CORPUS.queries[n]).all()
        rows = before[chosen].flatten()
        counts = torch.bincount(rows, minlength=CORPUS.vocabulary) / len(rows)
        error = (CORPUS.probabilities()[n] * (1 - CORPUS.probabilities()[n]) / len(rows)).sqrt()
        assert ((counts - CORPUS.probabilities()[n]).abs() <= 5 * error).all()


def test_the_model_is_its_formula() -> None:
    torch.manual_seed(0)
    model = OneLayer(CORPUS.vocabulary).scatter().double()
    model.attention.logits.data *= 20  # attention far from uniform
    before, last, _ = CORPUS.batch(5, generator(0, 1))
    logits = model(before, last)
    for b in range(5):
        weights = torch.stack([model.attention.logits[last[b], token] for token in before[b]]).softmax(0)
        held = torch.zeros(CORPUS.vocabulary, dtype=torch.float64)
        for weight, token in zip(weights, before[b], strict=True):
            held[token] += weight
        assert torch.allclose(logits[b], model.decoder @ (held / held.norm()), atol=1e-13)
    with torch.no_grad(), trace(model.float(), "entropy") as tracer:
        model(before, last)
    p = model.attention.logits[last[:, None], before].softmax(-1)
    wanted = -(p * p.log()).sum(-1)
    assert torch.allclose(torch.tensor(tracer.record["entropy"].to_numpy()).flatten(), wanted.detach(), atol=1e-5)


def test_gains_of_a_fast_decoder_follow_the_law() -> None:
    """The law is derived: it has to hold for dz/dt = k(t) c^2 whatever k is, solved in small steps."""
    chances = CORPUS.probabilities().gather(1, CORPUS.own).double()
    gains = torch.zeros_like(chances)
    for step in range(4000):  # k is 2.5 in the mean, and the law runs away at 13.5
        gains += 0.001 * (1 + 0.5 * (step % 7)) * (chances * gains.exp()) ** 2
    assert gains[0, -1] > 0.5
    # Euler's 4,000 steps: an error of a thousandth or so
    assert torch.allclose(predicted_gains(chances, gains[:, -1]), gains, rtol=1e-2)
    assert (
        prediction_error(gains, chances) < 0.01 < prediction_error(gains[:, -1:] * chances / chances[:, -1:], chances)
    )


def test_attention_gradient_of_a_settled_decoder_is_the_square() -> None:
    """What the law rests on: with Y learned of one c, dL/dz of a class's own token goes as c^2."""
    model = OneLayer(CORPUS.vocabulary).double()
    chances = CORPUS.probabilities().double()
    unit = chances / chances.norm(dim=1, keepdim=True)
    for n in range(4):
        target = torch.zeros(CORPUS.vocabulary, dtype=torch.float64)
        target[CORPUS.answers[n]] = 3.0
        model.decoder.data += torch.outer(target, unit[n])
    z = torch.zeros(CORPUS.vocabulary, dtype=torch.float64, requires_grad=True)
    held = composition(z[None], chances[:1])[0]
    logits = model.decoder @ (held / held.norm())
    logits.log_softmax(0)[CORPUS.answers[0]].backward()
    own = CORPUS.own[0]
    ratio = z.grad[own] / chances[0, own] ** 2
    assert torch.allclose(ratio, ratio[:1].expand(4), rtol=1e-10) and ratio[0] > 0
    assert (z.grad[: CORPUS.common] < 0).all()


def test_measures_on_cases_that_are_known() -> None:
    chances = torch.tensor([[0.5, 0.25, 0.25]])
    shares = composition(torch.tensor([[0.0, 0.0, 2.0]]).log1p(), chances)  # e^z = 1, 1, 3
    assert shares[0].tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 2])
    assert entropy(torch.full((1, 4), 0.25)).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert moved(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])) == 0.5
    steps = torch.tensor([0.0, 1.0, 3.0, 3.5, 3.6, 3.61])
    history = torch.stack([steps, torch.zeros(6)], -1)[:, None]
    speed = speeds(history, torch.tensor([[True, False]]))
    assert speed.tolist() == pytest.approx([1.0, 2.0, 0.5, 0.1, 0.01], abs=1e-6)
    assert snap(speed) == 3  # 0.1 of a fastest change of 2: record 3 on
    assert snap(torch.tensor([1.0, 0.9])) == 2
    logits = torch.zeros(4, CORPUS.vocabulary)
    logits[:, CORPUS.own[:, -1]] = 1.0
    told = summary(logits, CORPUS)
    assert (told["common"], told["rarest"], told["frequent"]) == (0.0, 0.0, 1.0)
    assert told["common_share"] == pytest.approx(3 / (3 + 0.1 + 0.4 + 0.7 + torch.e), abs=1e-4)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(HeadscopeError, match="3 distinct tokens"):
        ScanAndSnap(distinct=2)
    with pytest.raises(HeadscopeError, match=r"sweep_last is a list of numbers above 0, as \[1, 3\], not \('1', '3'\)"):
        ScanAndSnap(sweep_last=("1", "3"))


@pytest.mark.slow
def test_attention_scans_and_snaps() -> None:
    small = ScanAndSnap(
        small_steps=10, sweep_last=(1,), sweep_rates=(1.0,), sweep_ratios=(1.0, 10.0), length=64, batch=64
    )
    found = run_experiment(small, seeds=(0,), device="cpu")
    numbers = {name: float(values[0]) for name, values in found.numbers.items()}
    assert numbers["paper/order"] > 0.9 and numbers["paper/falling"] == 1
    assert numbers["paper/common_after"] < 0.6 * numbers["paper/common_before"]
    assert numbers["paper/last_speed"] < 0.1 and numbers["paper/snap"] < 80
    assert numbers["paper/moved_after"] < 0.5 * numbers["paper/moved_before"]
    assert numbers["sweep_1_1_10"] > numbers["sweep_1_1_1"]
    traced = found.curve("paper", "entropy")["value"]
    assert traced.iloc[-1] < traced.iloc[0] == pytest.approx(torch.tensor(63.0).log().item(), abs=1e-5)
