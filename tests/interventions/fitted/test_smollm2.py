"""A real model, small: training brings the loss of a few rows down, and the edit alone does what the training did."""

from __future__ import annotations

import pytest

from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import ITI, LoFiT, apply, load_intervention
from headscope.interventions.fitted.data import responses
from headscope.interventions.fitted.training import sft_objective

ROWS = [{"prompt": f"Q: Where is {name} from? A:", "response": " Zembla"} for name in ("Ada", "Bob")]
ANSWERS = [
    {"question": f"What is {n} plus 1?", "choices": [str(n + 1), str(n + 3)], "labels": [1, 0]} for n in range(1, 7)
]


@pytest.mark.slow
def test_offsets_teach_a_word_and_directions_are_of_length_1(smollm2: LanguageModel, tmp_path) -> None:
    given = {"heads": "L22H3,L24H5,L28H1", "offset_rate": 0.3, "epochs": 4, "batch": 2, "end": False}
    found = LoFiT(**given).fit(smollm2, ROWS, progress=False)
    losses = [step["loss"] for step in found.curves["offsets"]]
    path = found.save(tmp_path / "edit", smollm2)
    rows = responses(smollm2, ROWS, "sft", end=False, longest=400)
    before = float(sft_objective(smollm2, rows)(range(2)).detach())
    with apply(smollm2, load_intervention(path, smollm2)):
        after = float(sft_objective(smollm2, rows)(range(2)))
    assert abs(losses[0] - before) < 0.1 and after < 0.7 * before, losses
    pushed = ITI(share=0.01, batch=16).fit(smollm2, ANSWERS, progress=False)
    assert len(pushed.heads) == 2 and pushed.scores.mean.shape == (30, 9) and pushed.sigma.min() > 0
    assert abs((pushed.directions**2).sum(-1) - 1).max() < 1e-9
