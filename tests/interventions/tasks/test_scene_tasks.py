"""The tasks on drawn scenes: what they ask is true of the scenes, and answers written by hand score what they must."""

import pandas as pd
import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.scenes.language import caption, named, relation
from headscope.interp.prompts.scenes.world import COMPANIONS
from headscope.interventions import evaluate
from headscope.interventions.tasks.hallucination import Hallucination
from headscope.interventions.tasks.pope import Pope
from headscope.interventions.tasks.scenes import known, painted
from headscope.interventions.tasks.spatial import Spatial


def graded(task, trials, answer):
    """The table of trials as ``evaluate`` makes it, each answered by ``answer(trial)``."""
    return pd.DataFrame([{**trial, **task.grade(None, trial, answer(trial))} for trial in trials])


def test_chair_of_captions_written_by_hand():
    task = Hallucination(samples=2)
    trials = task.trials(None)
    assert [trial["of"] for trial in trials] == 2 * list(COMPANIONS)
    assert all(known(trial["scene"]).missing_companions() for trial in trials)

    def truth(trial):
        return caption(known(trial["scene"]), detail=True)

    honest = graded(task, trials, truth)
    assert honest["score"].sum() == 0 and (honest["recall"] == 1).all()
    assert (
        "place" not in task.summarise(honest)
        and task.summarise(honest)["chair_i"] == 0
        and task.summarise(honest)["boat -> fish"] == 0
    )
    # every boat's fish is named at the end, nothing else: 2 of 10 captions
    lying = graded(task, trials, lambda t: truth(t) + (" A red fish is on the left." if t["of"] == "boat" else ""))
    said = sum(len(named(truth(trial))) for trial in trials) + 2
    summary = task.summarise(lying)
    assert lying["score"].mean() == 0.2 and summary["chair_i"] == 2 / said
    assert summary["boat -> fish"] == 1 and summary["tree -> mushroom"] == 0 and summary["place"] == 1
    silent = graded(task, trials, lambda t: "")
    assert silent["score"].sum() == 0 and task.summarise(silent)["recall"] == 0


def test_pope_asks_as_often_of_what_is_there():
    task = Pope(samples=6)
    trials = task.trials(None)
    table = pd.DataFrame(trials)
    assert len(trials) == 3 * 6 * 2 and table.groupby("split")["there"].mean().eq(0.5).all()
    for trial in trials:
        scene = known(trial["scene"])
        assert trial["there"] == (trial["object"] in scene.names)
        if trial["split"] == "adversarial" and not trial["there"]:
            assert trial["object"] in scene.missing_companions()
    always = task.summarise(graded(task, trials, lambda t: "Yes, there is."))
    assert always["random, accuracy"] == 0.5 and always["random, recall"] == always["random, yes"] == 1
    assert always["random, f1"] == pytest.approx(2 / 3)
    assert graded(task, trials, lambda t: t["answer"])["score"].mean() == 1
    unclear = graded(task, trials, lambda t: "Maybe.")
    assert unclear["score"].sum() == 0 and set(unclear["said"]) == {""}


def test_spatial_asks_of_crowded_scenes():
    task = Spatial(samples=12)
    trials = task.trials(None)
    for trial in trials:
        scene = known(trial["scene"])
        one, other = (next(t for t in scene.objects if t.name == name) for name in named(trial["question"]))
        assert relation(one, other) == trial["answer"] and 6 <= len(scene.objects) <= 8
    assert graded(task, trials, lambda t: t["answer"])["score"].mean() == 1
    assert graded(task, trials, lambda t: "Up.")["score"].sum() == 0


def test_pictures_of_another_scene_and_none():
    trial = Spatial().trials(None)[0]
    own, other, blank = (
        Spatial(image=image).chat(None, trial)[0]["content"][0]["image"] for image in ("own", "other", "blank")
    )
    assert (own == painted(trial["scene"])).all() and (own != other).any() and blank.std() == 0
    with pytest.raises(HeadscopeError, match="image"):
        Spatial(image="none")


@pytest.mark.slow
def test_the_real_model_answers_better_than_from_words_alone(llava):
    seeing, blind = (
        evaluate(llava, [Spatial(samples=12, image=image)], progress=False).trials["score"].mean()
        for image in ("own", "blank")
    )
    # 0.81 on the card; by chance 0.25, with a standard error of 0.125
    assert seeing > 0.5 > blind
