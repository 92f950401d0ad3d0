"""Tables by hand; in SmolLM2 an edit towards the right letter goes with the sign of its neuron's activation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interventions.mechanisms.anchoring import AnchorStudy, study_anchor
from headscope.interventions.tasks.multiple_choice import MultipleChoice


def test_a_row_an_edit_and_sign() -> None:
    rows = pd.DataFrame(
        {
            "question": [1, 1, 3, 3, 1],
            "edit": ["value vector"] * 4 + ["keys swapped"],
            "activation": [2.0, -1.0, 3.0, -2.0, np.nan],
            "letter": ["B", "A", "B", "A", "A"],
            "right": [1.0, 0.0, 1.0, 0.0, 0.0],
            "change": [3.0, -4.0, 5.0, -6.0, 0.5],
        }
    )
    table = AnchorStudy(rows, HeadSet(((0, 1),)), 8, 3).to_frame().set_index(["edit", "sign"])
    up, down = table.loc[("value vector", "m > 0")], table.loc[("value vector", "m < 0")]
    assert (up["n"], up["right"], up["change"], up["anchor"]) == (2, 1.0, 4.0, 0.0)
    assert (down["n"], down["right"], down["change"], down["anchor"]) == (2, 0.0, -5.0, 1.0)
    assert up["change_low"] == 3.0 and up["change_high"] == 5.0  # two questions: within the range of the scores
    assert np.isnan(table.loc[("keys swapped", ""), "change_low"])  # one question has no interval


@pytest.mark.parametrize("setting", ["prompts", "last"])
def test_numbers_of_nothing_are_refused(setting: str) -> None:
    with pytest.raises(HeadscopeError, match=f"{setting} is .* at least 1"):
        study_anchor("no model is read", **{setting: 0})


@pytest.mark.slow
def test_smollm2_is_anchored_and_the_sign_decides(smollm2: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="scoring='letter'"):
        study_anchor(smollm2, MultipleChoice(scoring="cloze"))
    task = MultipleChoice(questions=2, orders=2)
    study = study_anchor(smollm2, task, prompts=1, last=5, heads=1, controls=1, progress=False)
    assert study.asked == 4 and 2 <= study.anchored <= 4
    own = study.trials[study.trials["edit"] == "value vector"]
    up, down = (own[own["activation"] * sign > 0] for sign in (1, -1))
    assert len(up) and (up["change"] > 0).all()
    assert (down["change"] < up["change"].max()).all()
    assert {"other neuron", "keys swapped", "random heads"} <= set(study.trials["edit"])
