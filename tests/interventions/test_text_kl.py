"""The side effect of an edit: KL to the unedited model, against the same written out, and what it compares with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import AblateHeads, Intervention, ScaleHeads, TextKL, TextLoss, apply, evaluate
from headscope.interventions.tasks.text_kl import divergence

TEXT = " ".join(f"w{(7 * i) % 50}" for i in range(200))
EDIT = AblateHeads([(0, 1), (1, 2)])


def test_of_a_fair_coin_and_a_loaded_one() -> None:
    """p = (1/2, 1/2), q = (9/10, 1/10): KL(p || q) = log(5/3), and log(9/10) + 0.8 log 3 the other way."""
    coin = torch.log(torch.tensor([[0.5, 0.5]])).double()
    loaded = torch.log(torch.tensor([[0.9, 0.1]]).double())
    assert float(divergence(coin, loaded)) == pytest.approx(float(torch.log(torch.tensor(5 / 3).double())), rel=1e-6)
    assert float(divergence(loaded, coin)) == pytest.approx(0.9 * 0.5877866649 + 0.1 * -1.6094379124, rel=1e-6)
    shut = torch.tensor([[0.0, 0.0, -torch.inf]])  # a token that both rule out
    assert float(divergence(shut, shut)) == 0.0
    assert float(divergence(shut, torch.zeros(1, 3))) == pytest.approx(float(torch.log(torch.tensor(1.5))))


@pytest.mark.parametrize("length", [20, 90])
def test_it_is_the_mean_over_positions(lm: LanguageModel, length: int) -> None:
    """Longer than the rows that are compared at a time, too. Logits are the model's own, and the formula's float64 sums
    of 64 terms round by 64 * 1.1e-16 of terms below 10."""
    task = TextKL(passages=2, length=length, text=TEXT)
    trial = task.trials(lm)[1]
    ready = task.prepare(lm, trial)
    ids = torch.tensor([trial["ids"]])
    with torch.no_grad():
        p = lm.model(input_ids=ids).logits[0].double().softmax(-1)
        with apply(lm, EDIT):
            q = lm.model(input_ids=ids).logits[0].double().softmax(-1)
    with apply(lm, EDIT):
        found = task.run(lm, ready)
    each = (p * (p / q).log()).sum(-1)
    assert found["score"] == pytest.approx(float(each.mean()), abs=1e-12) and found["score"] > 1e-3
    assert found["largest"] == pytest.approx(float(each.max())) and found["position"] == int(each.argmax())
    assert found["score"] != pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-3), "the other direction"
    assert task.run(lm, ready)["score"] == 0.0, "the edit is gone, and so is the divergence"


def test_evaluated_it_is_exactly_nothing_without_an_edit(lm: LanguageModel) -> None:
    task = TextKL(passages=3, length=16, text=TEXT)
    edits = [EDIT, ScaleHeads([(0, 1)], 3.0, strength=0.0), ScaleHeads([(0, 1)], 3.0)]
    scores = evaluate(lm, [task], edits, controls=2, progress=False).scores("text_kl")
    assert scores.shape == (3, 1 + 3 * 3)
    assert (scores["no edit"] == 0).all() and (scores[edits[1].name] == 0).all()
    assert (scores[EDIT.name] > 0).all() and (scores[edits[2].name] > 0).all()
    for number, trial in enumerate(task.trials(lm)):
        ready = task.prepare(lm, trial)
        with apply(lm, EDIT):
            assert task.run(lm, ready)["score"] == scores.loc[number, EDIT.name]


class Counted(TextKL):
    """Says when the unedited model reads a passage, and how many prepared trials are alive."""

    def __init__(self) -> None:
        super().__init__(passages=3, length=8, text=TEXT)
        object.__setattr__(self, "log", [])

    def prepare(self, lm: LanguageModel, trial: Any) -> Any:
        vars(self)["log"].append(("prepare", trial["passage"]))
        return super().prepare(lm, trial)

    def run(self, lm: LanguageModel, trial: Any) -> dict[str, Any]:
        vars(self)["log"].append(("run", trial["passage"]))
        return super().run(lm, trial)


def test_every_passage_is_read_once_more_and_kept_while_its_conditions_run(llama: LanguageModel, tmp_path: Any) -> None:
    task = Counted()
    result = evaluate(llama, [TextLoss(passages=2, length=8, text=TEXT), task], [EDIT], controls=1, out=tmp_path)
    log = vars(task)["log"]
    assert log == [entry for i in range(3) for entry in [("prepare", i), *[("run", i)] * 3]]
    assert list(result.scores("text_kl").columns) == list(result.scores("text_loss").columns)
    part = result.trials[result.trials["task"] == "text_kl"]
    assert list(part["passage"]) == list(part["trial"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "unedited" not in result.trials and "unedited" not in (tmp_path / "evaluation.trials.jsonl").read_text()


def test_it_goes_on_in_the_middle_of_a_passage(llama: LanguageModel, tmp_path: Any) -> None:
    class Breaks(Intervention):
        name = "breaks"
        passes = 0

        def edit(self, call: Any) -> Any:
            Breaks.passes += 1
            if Breaks.passes == 3:
                raise InterruptedError("the power went out")
            return call

    task, edits = TextKL(passages=2, length=8, text=TEXT), [EDIT, Breaks()]
    with pytest.raises(InterruptedError):
        evaluate(llama, [task], edits, controls=1, out=tmp_path, progress=False)
    found = evaluate(llama, [task], edits, controls=1, out=tmp_path, progress=False).scores("text_kl")
    whole = evaluate(llama, [task], edits, controls=1, progress=False).scores("text_kl")
    assert found.equals(whole)


def test_bad_calls_are_one_line(llama: LanguageModel) -> None:
    task = TextKL(passages=2, length=8, text=TEXT)
    with pytest.raises(HeadscopeError, match=r"text_kl compares with the unedited model: run\(lm, prepare"):
        task.run(llama, task.trials(llama)[0])
    with pytest.raises(HeadscopeError, match="text_kl needs 800 tokens of text and was given 200"):
        TextKL(length=800, text=TEXT).trials(llama)


@pytest.mark.slow
def test_of_a_real_model(smollm2: LanguageModel) -> None:
    """More strength, more divergence; torch's own formula in float32 agrees to its rounding, 49,152 terms of 1e-7."""
    task = TextKL(passages=1, length=48)
    trial = task.trials(smollm2)[0]
    ready, found = task.prepare(smollm2, trial), []
    for strength in (0.0, 0.5, 1.0):
        with apply(smollm2, AblateHeads("L0H1,L0H2,L1H0", strength=strength)):
            found.append(task.run(smollm2, ready)["score"])
            log_q = task.logits(smollm2, trial).log_softmax(-1)
    reference = torch.nn.functional.kl_div(
        log_q, ready["unedited"].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found[0] == 0.0 < found[1] < found[2] == pytest.approx(float(reference), rel=1e-3)
