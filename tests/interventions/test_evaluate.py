"""Evaluation: its conditions, its numbers against the formulas written out, and runs that were interrupted."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.multiple import holm
from headscope.interp.runs.estimate import dry_run
from headscope.interp.runs.journal import Journal
from headscope.interp.sites import is_attached
from headscope.interventions import AblateHeads, Evaluation, Intervention, TextLoss, evaluate
from headscope.interventions.evaluation.evaluate import journal_in, plan
from headscope.interventions.tasks import TASKS, resolve

PICKED = [(0, 1), (1, 0), (1, 3)]
LAYERS, HEADS = 2, 4


@dataclass
class Alive:
    """A task that says how far the edited heads are from the unedited ones: the sum of the logits of a prompt."""

    prompts: tuple[str, ...] = ("w1 w2 w3", "w4 w5 w6 w7", "w8")
    fail_at: int | None = None
    name: str = "alive"
    metric: str = "a logit"
    ran: list[str] = field(default_factory=list)

    def parameters(self, model: Any) -> dict[str, Any]:
        return {"prompts": list(self.prompts)}

    def trials(self, model: Any) -> list[dict[str, Any]]:
        return [{"prompt": prompt, "words": len(prompt.split())} for prompt in self.prompts]

    def tokens(self, model: Any, trial: dict[str, Any]) -> tuple[int, int]:
        return trial["words"], 2

    def run(self, model: Any, trial: dict[str, Any]) -> dict[str, Any]:
        if self.fail_at is not None and len(self.ran) == self.fail_at:
            raise InterruptedError("the power went out")
        self.ran.append(trial["prompt"])
        return {"score": self.value(model, trial["prompt"]), "said": trial["prompt"].upper()}

    @staticmethod
    def value(model: Any, prompt: str) -> float:
        return float(model(prompt).logits[0, -1, 0])


def table(scores: dict[str, list[float]], controls_of: str = "edit") -> Evaluation:
    """An evaluation of made-up scores: "no edit", "edit" and controls."""
    kinds = {"no edit": "baseline", controls_of: "intervention"}
    rows = [
        {
            "task": "made up",
            "condition": condition,
            "kind": kinds.get(condition, "control"),
            "of": "" if condition in kinds else controls_of,
            "trial": trial,
            "score": score,
        }
        for condition, values in scores.items()
        for trial, score in enumerate(values)
    ]
    return Evaluation.from_rows(rows, {"made up": "points"}, {"seed": 0})


# -- conditions ------------------------------------------------------------------------------------------------------


def test_baseline_first_then_each_intervention_and_its_controls(llama: LanguageModel) -> None:
    found = plan(llama, [AblateHeads(PICKED), AblateHeads(PICKED[:1], "uniform")], controls=2, seed=0)
    assert [c.name for c in found] == [
        "no edit",
        "ablate 3 heads (zero)",
        "random for ablate 3 heads (zero) (seed 0)",
        "random for ablate 3 heads (zero) (seed 1)",
        "ablate 1 heads (uniform)",
        "random for ablate 1 heads (uniform) (seed 0)",
        "random for ablate 1 heads (uniform) (seed 1)",
    ]
    assert [c.kind for c in found] == ["baseline", *(["intervention", "control", "control"] * 2)]
    assert found[0].edits == () and [c.of for c in found[1:4]] == ["", found[1].name, found[1].name]


def test_equal_interventions_get_names_of_their_own(llama: LanguageModel) -> None:
    found = plan(llama, [AblateHeads(PICKED), AblateHeads([(0, 0), (0, 2), (1, 1)])], controls=1, seed=0)
    names = [c.name for c in found]
    assert len(set(names)) == len(names) == 5
    assert found[4].of == found[3].name != found[1].name


def heads_of(edits: tuple[Intervention, ...]) -> list[tuple[int, int]]:
    return [head for edit in edits for head in edit.heads or ()]


@pytest.mark.parametrize("seed", range(20))
def test_controls_are_layer_matched_and_hold_no_ablated_head(llama: LanguageModel, seed: int) -> None:
    first = AblateHeads([(0, 1), (1, 2)], "uniform", strength=0.5, during="decode")
    pair = [first, AblateHeads([(1, 0), (0, 3)])]
    for edits in ([first], pair):
        conditions = plan(llama, [edits], controls=3, seed=seed)
        for control in conditions[2:]:
            drawn, ablated = heads_of(control.edits), heads_of(tuple(edits))
            assert not set(drawn) & set(ablated)
            assert [layer for layer, _ in drawn] == [layer for layer, _ in ablated]
            assert len(set(drawn)) == len(drawn), "two edits' controls fell on the same head"
            HeadSet.of(drawn).check(LAYERS, HEADS)
            settings = {k: v for k, v in control.edits[0].describe().items() if k != "heads"}
            assert settings == {k: v for k, v in first.describe().items() if k != "heads"}


def test_edits_of_the_same_head_have_the_same_control_head(llama: LanguageModel) -> None:
    prompt, steps = AblateHeads([(0, 1)], during="prefill"), AblateHeads([(1, 2), (0, 1)], "uniform", during="decode")
    for control in plan(llama, [[prompt, steps]], controls=5, seed=0)[2:]:
        one, two = (list(edit.heads or ()) for edit in control.edits)
        assert one == two[1:] and one[0] != (0, 1)


def test_controls_keep_weights_and_cover_the_layer(llama: LanguageModel) -> None:
    heads = HeadSet(((1, 2), (0, 1)), (3.0, 2.0))
    conditions = plan(llama, [AblateHeads(heads)], controls=40, seed=0)
    sets = [control.edits[0].heads for control in conditions[2:]]
    assert all(drawn is not None and drawn.weights == (3.0, 2.0) for drawn in sets)
    drawn = {head for control in sets if control is not None for head in control}
    assert drawn == {(layer, head) for layer in range(LAYERS) for head in range(HEADS)} - set(heads)


def test_seeds_decide_the_controls(llama: LanguageModel) -> None:
    def drawn(seed: int) -> list[list[tuple[int, int]]]:
        return [heads_of(c.edits) for c in plan(llama, [AblateHeads([(0, 1), (1, 2)])], controls=6, seed=seed)[2:]]

    assert drawn(0) == drawn(0) and drawn(0)[3:] == drawn(3)[:3] and drawn(0) != drawn(6)


def test_an_edit_without_heads_has_no_control(llama: LanguageModel) -> None:
    class Nudge(Intervention):
        name = "nudge"

    assert [c.kind for c in plan(llama, [Nudge()], controls=0, seed=0)] == ["baseline", "intervention"]


def test_bad_conditions_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="set controls to at least 1"):
        plan(llama, [AblateHeads(PICKED)], controls=0, seed=0)
    with pytest.raises(HeadscopeError, match="L7H0 does not exist"):
        plan(llama, [AblateHeads([(7, 0)])], controls=1, seed=0)
    with pytest.raises(HeadscopeError, match="layer 0 has 1 heads left for a control of 3"):
        plan(llama, [AblateHeads([(0, 0), (0, 1), (0, 2)])], controls=1, seed=0)


# -- runs ------------------------------------------------------------------------------------------------------------


def test_every_condition_runs_every_trial_under_its_edit(lm: LanguageModel) -> None:
    task = Alive()
    edit = AblateHeads(PICKED)
    result = evaluate(lm, [task], [edit], controls=2, progress=False)
    scores = result.scores("alive")
    conditions = plan(lm, [edit], controls=2, seed=0)
    assert list(scores.columns) == [c.name for c in conditions] and list(scores.index) == [0, 1, 2]
    for condition in conditions:
        for trial, prompt in enumerate(task.prompts):
            expected = by_hand(lm, prompt, heads_of(condition.edits))
            assert scores.loc[trial, condition.name] == pytest.approx(expected, abs=2e-5)
    assert len({round(x, 3) for x in scores.loc[0]}) == 4, "conditions do not differ, so the test shows nothing"
    assert (result.trials["said"] == result.trials["prompt"].str.upper()).all()
    assert list(result.trials["words"][:3]) == [3, 4, 1]
    assert not is_attached(lm)


def by_hand(lm: LanguageModel, prompt: str, heads: list[tuple[int, int]]) -> float:
    """The task's score with ``heads`` zeroed by plain hooks on the output projections."""
    hooks = []
    for layer, block in enumerate(
        getattr(lm.model, "transformer", lm.model).h if hasattr(lm.model, "transformer") else lm.model.model.layers
    ):
        module = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj

        def zero(module: Any, args: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            x = args[0].clone()
            for at, head in heads:
                if at == layer:
                    x[..., head * 8 : head * 8 + 8] = 0
            return (x,)

        hooks.append(module.register_forward_pre_hook(zero))
    try:
        return Alive.value(lm, prompt)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_tasks_own_keys_do_not_replace_the_tables(llama: LanguageModel) -> None:
    class Clash(Alive):
        def trials(self, model: Any) -> list[dict[str, Any]]:
            return [{"kind": "mine", "trial": 7, "prompt": "w1", "words": 1} for _ in range(2)]

    result = evaluate(llama, [Clash()], [], progress=False)
    assert list(result.trials["kind"]) == ["baseline"] * 2 and list(result.trials["trial"]) == [0, 1]


def test_tasks_by_name_and_errors(llama: LanguageModel) -> None:
    assert [task.name for task in resolve(["needle", "text_loss"])] == ["needle", "text_loss"]
    assert {"needle", "text_loss"} < set(TASKS)
    assert [task.name for task in resolve("needle")] == ["needle"]
    with pytest.raises(HeadscopeError, match=r"'nedle' \(did you mean 'needle'\?\); known: needle, multiple_choice, "):
        resolve(["nedle"])
    with pytest.raises(HeadscopeError, match="at least one task"):
        resolve([])
    with pytest.raises(HeadscopeError, match="same name"):
        evaluate(llama, [Alive(), Alive(prompts=("w9",))])


def test_objects_that_are_no_tasks_are_told_in_one_line() -> None:
    class Old(Alive):
        def tokens(self, trial: dict[str, Any]) -> tuple[int, int]:  # type: ignore[override]
            return 1, 1

    with pytest.raises(HeadscopeError, match=r"task 'alive': evaluate calls tokens\(lm, trial\)"):
        resolve([Old()])
    with pytest.raises(HeadscopeError, match="task 'int' has no name, metric, trials"):
        resolve([3])
    assert [task.name for task in resolve(Alive())] == ["alive"]


def test_text_loss_is_the_cross_entropy_of_every_token_after_the_first(lm: LanguageModel) -> None:
    text = " ".join(f"w{(7 * i) % 50}" for i in range(60))
    task = TextLoss(passages=2, length=20, text=text)
    trials = task.trials(lm)
    ids = lm.tokenizer(text)["input_ids"]
    assert [trial["ids"] for trial in trials] == [ids[0:20], ids[30:50]]
    logits = lm.model(input_ids=torch.tensor([trials[1]["ids"]])).logits[0].double().detach()
    losses = [-logits[i].log_softmax(-1)[trials[1]["ids"][i + 1]] for i in range(19)]
    assert task.run(lm, trials[1])["score"] == pytest.approx(float(sum(losses) / 19), rel=1e-6)
    assert task.tokens(lm, trials[0]) == (20, 0)
    assert len(TextLoss(passages=9, length=20, text=text).trials(lm)) == 3, "passages overlap"


def test_text_loss_needs_enough_text(llama: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="needs 20 tokens of text and was given 2"):
        TextLoss(length=20, text="w1 w2").trials(llama)
    for broken in (dict(passages=0), dict(length=1)):
        with pytest.raises(HeadscopeError, match="at least 1 passage of at least 2 tokens"):
            TextLoss(text="w1 w2 w3", **broken).trials(llama)


# -- numbers ---------------------------------------------------------------------------------------------------------

BASE = [0.9, 0.4, 0.7, 1.0, 0.2, 0.6]
EDIT = [0.3, 0.1, 0.7, 0.2, 0.2, 0.5]
RANDOM = {"random 0": [0.8, 0.4, 0.6, 1.0, 0.1, 0.7], "random 1": [0.3, 0.0, 0.7, 0.2, 0.0, 0.3]}


def test_summary_is_means_and_paired_differences() -> None:
    summary = table({"no edit": BASE, "edit": EDIT, **RANDOM}).summary().set_index("condition")
    assert list(summary.index) == ["no edit", "edit", "random 0", "random 1"]
    for name, values in {"no edit": BASE, "edit": EDIT, **RANDOM}.items():
        row = summary.loc[name]
        assert row["mean"] == pytest.approx(sum(values) / 6)
        assert row["delta"] == pytest.approx(sum(values) / 6 - sum(BASE) / 6)
        assert row["n"] == 6
    assert (summary.loc["no edit", ["delta", "delta_low", "delta_high"]] == 0).all()
    # All 6^6 resamples are the bootstrap's exact distribution. A tail of ``expanded`` is 0.24 % at n = 6; drawn from
    # 4,000 resamples its bound has, in it, a probability beyond it with a standard error of sqrt(0.0024 / 4000) =
    # 0.078 %: 3 of those are 0.23 %.
    draws = np.array(list(itertools.product(range(6), repeat=6)))
    for column, values in {"ci": np.array(EDIT), "delta": np.array(EDIT) - np.array(BASE)}.items():
        means = values[draws].mean(1)
        low, high = summary.loc["edit", f"{column}_low"], summary.loc["edit", f"{column}_high"]
        assert np.quantile(means, 0.0001) - 1e-9 <= low <= np.quantile(means, 0.0047) + 1e-9
        assert np.quantile(means, 0.9953) - 1e-9 <= high <= np.quantile(means, 0.9999) + 1e-9
    # four trials differ, all downwards: of 16 signs, these and the opposite ones are as far from 0
    assert summary.loc["edit", "p_permutation"] == pytest.approx(2 / 16)
    assert np.isnan(summary.loc["no edit", "p_permutation"])


def test_differences_are_paired_not_of_independent_samples() -> None:
    base = np.linspace(0, 100, 12)
    summary = table({"no edit": list(base), "edit": list(base - 1)}).summary().set_index("condition")
    row = summary.loc["edit"]
    assert row["delta_low"] == pytest.approx(-1) and row["delta_high"] == pytest.approx(-1)
    assert row["ci_high"] - row["ci_low"] > 20


def test_contrasts_are_against_the_mean_of_the_controls() -> None:
    row = table({"no edit": BASE, "edit": EDIT, **RANDOM}).contrasts().iloc[0]
    random = np.array(list(RANDOM.values()))  # (control, trial)
    assert row["intervention"] == pytest.approx(2.0 / 6)
    assert row["random"] == pytest.approx(random.mean())
    assert row["difference"] == pytest.approx(2.0 / 6 - random.mean())
    assert (row["rank"], row["controls"], row["n"]) == (1, 2, 6)  # random 1, with 0.25, is below the edit's 0.333
    assert row["p_lower"] == pytest.approx(2 / 3) and row["p_higher"] == pytest.approx(2 / 3)
    assert row["p_two_sided"] == 1.0 and row["p_least"] == pytest.approx(1 / 3) and np.isnan(row["p_worse"])
    assert row["low"] < row["difference"] < row["high"]


@pytest.mark.parametrize("better", [True, False])
def test_both_tails_and_the_bad_one(better: bool) -> None:
    """Nineteen controls below the edit: as high as it is, no random set; the least p of a tail is 1 in 20."""
    scores = {"no edit": BASE, "edit": EDIT} | {f"random {i}": [x - 0.01 * (i + 1) for x in EDIT] for i in range(19)}
    made = table(scores)
    found = Evaluation(made.trials, made.metrics, made.provenance, {"made up": better})
    row = found.contrasts().iloc[0]
    assert (row["p_lower"], row["p_higher"], row["p_two_sided"], row["p_least"]) == (1.0, 0.05, 0.1, 0.05)
    assert row["p_worse"] == (1.0 if better else 0.05) and row["higher_is_better"] == better
    assert set(found.summary()["higher_is_better"]) == {better}


def test_p_values_are_uniform_under_no_effect() -> None:
    """Edit and 19 controls drawn alike: P(p <= k / 20) is k / 20 exactly. Of 2,000, the number at or below 1 in 20 has
    the standard deviation sqrt(2000 * 0.05 * 0.95) = 9.7: 100 -/+ 39 is 4 of them. Two-sided at 1 in 10 likewise."""
    rng = np.random.default_rng(0)
    tails = {"p_lower": 0, "p_higher": 0, "p_two_sided": 0}
    for _ in range(2000):
        drawn = rng.normal(size=20)
        edit, controls = drawn[0], drawn[1:]
        lower, higher = (1 + (controls <= edit).sum()) / 20, (1 + (controls >= edit).sum()) / 20
        scores = {"no edit": [0.0], "edit": [edit], **{f"random {i}": [x] for i, x in enumerate(controls)}}
        if _ < 20:  # the table's numbers are these
            row = table(scores).contrasts().iloc[0]
            assert (row["p_lower"], row["p_higher"]) == pytest.approx((lower, higher))
        tails["p_lower"] += lower <= 0.05
        tails["p_higher"] += higher <= 0.05
        tails["p_two_sided"] += min(1, 2 * min(lower, higher)) <= 0.1
    assert all(61 <= tails[name] <= 139 for name in ("p_lower", "p_higher"))
    assert 147 <= tails["p_two_sided"] <= 253  # 200 -/+ 4 sqrt(2000 * 0.1 * 0.9)


def test_a_control_of_the_same_score_counts_against_the_intervention() -> None:
    row = table({"no edit": BASE, "edit": EDIT, "random 0": EDIT}).contrasts().iloc[0]
    assert row["rank"] == 1 and row["p_lower"] == 1.0 and row["difference"] == 0


def test_contrasts_of_each_intervention_use_its_own_controls(llama: LanguageModel) -> None:
    edits = [AblateHeads([(0, 1)]), AblateHeads([(1, 2)], "uniform")]
    result = evaluate(llama, [Alive(), Alive(name="again", prompts=("w5 w6", "w7"))], edits, controls=3, progress=False)
    contrasts = result.contrasts()
    assert len(contrasts) == 4 and list(contrasts["n"]) == [3, 3, 2, 2]
    for _, row in contrasts.iterrows():
        scores = result.scores(row["task"])
        own = scores[[c for c in scores if c.startswith(f"random for {row['condition']} (seed")]]
        assert own.shape[1] == row["controls"] == 3
        assert row["random"] == pytest.approx(own.to_numpy().mean())
        assert row["rank"] == int((own.mean() <= scores[row["condition"]].mean()).sum())


def test_trials_of_a_group_count_as_one() -> None:
    """Three questions in two orders each; trials without a group are alone in theirs."""
    made = table({"no edit": BASE, "edit": EDIT, "random 0": RANDOM["random 0"], "random 1": RANDOM["random 1"]})
    named = ["a", "a", "b", "b", "c", "c"]
    found = Evaluation(made.trials.assign(group=named * 4), made.metrics, {})
    labels = found.groups("made up")
    assert made.groups("made up") is None and labels is not None and labels.tolist() == [0, 0, 1, 1, 2, 2]
    row = found.summary().set_index("condition").loc["edit"]
    assert (row["n"], row["groups"]) == (6, 3) and row["delta"] == pytest.approx(np.mean(EDIT) - np.mean(BASE))
    assert row["p_permutation"] == pytest.approx(2 / 8)  # every question lost
    sums = (np.array(EDIT) - np.array(BASE)).reshape(3, 2).mean(1)
    assert row["delta_low"] == pytest.approx(sums.min()) and row["delta_high"] == pytest.approx(sums.max())
    whole, single = found.contrasts().iloc[0], made.contrasts().iloc[0]
    assert whole["difference"] == single["difference"] and whole["low"] != single["low"]
    alone = Evaluation(made.trials.assign(group=["a", "a", None, None, "c", "c"] * 4), made.metrics, {})
    assert list(alone.summary()["groups"]) == [4] * 4


def test_holm_is_over_the_tasks_of_a_condition_or_over_everything() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for task, effect in {"a": 1.0, "b": 0.4, "c": 0.0}.items():
        for condition, kind in {"no edit": "baseline", "one": "intervention", "two": "intervention"}.items():
            scores = rng.normal(size=10) + (effect if kind == "intervention" else 0.0)
            made = {"task": task, "condition": condition, "kind": kind, "of": "", "score": scores}
            rows += [{**made, "trial": i, "score": x} for i, x in enumerate(scores)]
            rows += [
                {**made, "condition": f"{control} {condition}", "kind": "control", "of": condition, "control": control}
                | {"trial": i, "score": x + shift}
                for control, shift in (("random heads", -1.0), ("random vectors", 1.0))
                for i, x in enumerate(scores)
                if kind == "intervention"
            ]
    found = Evaluation.from_rows(rows, {"a": "points", "b": "points", "c": "points"}, {})
    for frame, p, by in ((found.summary(), "p_permutation", "condition"), (found.contrasts(), "p_two_sided", "")):
        for _, family in frame.groupby(by or ["condition", "control"]):
            assert len(family) == 3
            np.testing.assert_allclose(family["p_holm"], holm(family[p].to_numpy()))
    wider = found.summary("tasks and conditions")
    edits = wider[wider["kind"] == "intervention"]
    assert len(edits) == 6 and edits["p_permutation"].min() < 0.05
    np.testing.assert_allclose(edits["p_holm"], holm(edits["p_permutation"].to_numpy()))
    contrasts = found.contrasts("tasks and conditions")
    assert list(contrasts["control"]) == ["random heads", "random vectors"] * 6
    assert (np.sign(contrasts["difference"]) == [1, -1] * 6).all(), "the kinds of control were mixed"


def test_one_trial_has_no_interval() -> None:
    result = table({"no edit": [0.5], "edit": [0.2], "random 0": [0.4]})
    assert result.summary()[["ci_low", "ci_high", "delta_low", "delta_high"]].isna().all(axis=None)
    assert result.contrasts()[["low", "high"]].isna().all(axis=None)


def test_no_intervention_is_a_plain_evaluation(llama: LanguageModel, tmp_path: Path) -> None:
    result = evaluate(llama, [Alive()], [], out=tmp_path, progress=False)
    assert len(result.summary()) == 1 and len(result.contrasts()) == 0
    assert len(Evaluation.load(tmp_path).trials) == 3


# -- resuming --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_stopped(llama: LanguageModel, tmp_path: Path) -> None:
    edit = AblateHeads([(0, 1), (1, 2)])
    whole = evaluate(llama, [Alive()], [edit], controls=2, out=tmp_path / "whole", progress=False)
    broken = Alive(fail_at=5)
    with pytest.raises(InterruptedError):
        evaluate(llama, [broken], [edit], controls=2, out=tmp_path / "run", progress=False)
    assert not is_attached(llama)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["evaluation.trials.jsonl"]
    rest = Alive()
    result = evaluate(llama, [rest], [edit], controls=2, out=tmp_path / "run", progress=False)
    assert len(broken.ran) == 5 and len(rest.ran) == 12 - 5
    pd.testing.assert_frame_equal(result.trials, whole.trials)
    again = Alive()
    evaluate(llama, [again], [edit], controls=2, out=tmp_path / "run", progress=False)
    assert again.ran == []


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(controls=3),
        dict(interventions=[AblateHeads([(0, 2)])]),
        dict(interventions=[AblateHeads([(0, 1)], strength=0.5)]),
        dict(tasks=[Alive(prompts=("w1", "w2"))]),
        dict(tasks=[Alive(name="other")]),
    ],
)
def test_other_settings_are_refused(llama: LanguageModel, tmp_path: Path, change: dict[str, Any]) -> None:
    settings: dict[str, Any] = dict(tasks=[Alive()], interventions=[AblateHeads([(0, 1)])], controls=1, seed=0)
    evaluate(llama, **settings, out=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(HeadscopeError, match="belongs to a run with other settings"):
        evaluate(llama, **{**settings, **change}, out=tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_model_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    evaluate(llama, [Alive()], out=tmp_path, progress=False)
    other = LanguageModel.wrap(llama.model, llama.tokenizer, name=llama.name, revision="seed 2")
    with pytest.raises(HeadscopeError, match=re.escape("other settings (model)")):
        evaluate(other, [Alive()], out=tmp_path, progress=False)


def test_a_dry_run_runs_nothing_and_writes_nothing(llama: LanguageModel, tmp_path: Path) -> None:
    task = Alive()
    with dry_run() as planned:
        evaluate(llama, [task], [AblateHeads([(0, 1)])], controls=2, out=tmp_path / "run", progress=False)
        raise AssertionError("went on after the plan")
    assert task.ran == [] and not (tmp_path / "run").exists()
    assert planned.passes == [(3, 2), (4, 2), (1, 2)] * 4
    evaluate(llama, [task], [AblateHeads([(0, 1)])], controls=2, out=tmp_path / "run", progress=False)
    assert len(task.ran) == len(planned.passes)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(planned.files)


# -- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(llama: LanguageModel, tmp_path: Path) -> None:
    tasks = [Alive(), TextLoss(passages=2, length=8, text=" ".join(["w1 w2 w5"] * 8))]
    result = evaluate(llama, tasks, [AblateHeads([(0, 1)])], controls=2, seed=3, out=tmp_path, progress=False)
    loaded = Evaluation.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.summary(), result.summary())
    pd.testing.assert_frame_equal(loaded.contrasts(), result.contrasts())
    assert loaded.higher_is_better == {"alive": None, "text_loss": False}
    assert loaded.metrics == {"alive": "a logit", "text_loss": "nats per token"}
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["provenance"] == loaded.provenance == json.loads(json.dumps(result.provenance))
    assert document["provenance"]["seed"] == 3 and document["provenance"]["model"]["revision"] == "seed 1"
    assert [c["kind"] for c in document["provenance"]["conditions"]] == ["baseline", "intervention", *["control"] * 2]
    assert document["summary"][1]["mean"] == pytest.approx(result.summary()["mean"][1])


def test_a_trial_without_interval_is_valid_json(llama: LanguageModel, tmp_path: Path) -> None:
    evaluate(llama, [Alive(prompts=("w1",))], [AblateHeads([(0, 1)])], controls=1, out=tmp_path, progress=False)
    document = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert document["summary"][0]["ci_low"] is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "metrics": {}}', "\x00\xff"])
def test_files_that_are_no_evaluation(llama: LanguageModel, tmp_path: Path, content: str) -> None:
    with pytest.raises(HeadscopeError, match="holds no evaluation"):
        Evaluation.load(tmp_path / "nowhere")
    evaluate(llama, [Alive()], out=tmp_path, progress=False)
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(HeadscopeError, match="holds no evaluation|an evaluation of format 1"):
        Evaluation.load(tmp_path)


def test_trials_that_are_no_evaluation(llama: LanguageModel, tmp_path: Path) -> None:
    evaluate(llama, [Alive()], out=tmp_path, progress=False)
    pd.DataFrame({"task": ["alive"]}).to_parquet(tmp_path / "evaluation.parquet")
    with pytest.raises(HeadscopeError, match="not the file that it was written with"):
        Evaluation.load(tmp_path)
    (tmp_path / "evaluation.parquet").write_bytes(b"PAR1")
    with pytest.raises(HeadscopeError, match="holds no evaluation"):
        Evaluation.load(tmp_path)


def test_the_journal_is_a_plain_journal(llama: LanguageModel, tmp_path: Path) -> None:
    evaluate(llama, [Alive()], out=tmp_path, progress=False)
    path = tmp_path / "evaluation.trials.jsonl"
    config = json.loads(path.read_text().splitlines()[0])["headscope_run"]
    assert sorted(Journal(path, config).entries) == [0, 1, 2]


def test_what_an_edit_says_of_itself_stands_in_the_results(llama: LanguageModel, tmp_path: Path) -> None:
    """An edit that cannot change what prose scores is named, and acts where the passage counts as written."""
    from headscope.interp.reports.evaluation import notes

    edits = [AblateHeads([(0, 1)], during="decode"), AblateHeads([(0, 1)], during="answer")]
    text = "w1 w2 w3 w4 w5 w6 w7 w8 " * 9
    read, written = (TextLoss(passages=1, length=16, text=text, written=one) for one in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(llama, read, edits, controls=1, out=tmp_path, progress=False)
    lines = notes(Evaluation.load(tmp_path))
    assert len(lines) == 2 and all("give written=True" in line for line in lines)
    assert "no row of its passes was meant" in lines[0] and "no row" not in lines[1]
    assert found.summary()["delta"].abs().max() == 0
    found = evaluate(llama, written, edits, controls=1, progress=False)
    assert not notes(found) and (found.summary().query("kind == 'intervention'")["delta"].abs() > 1e-4).all()


def test_like_edits_are_counted_and_results_without_a_journal_are_kept(llama: LanguageModel, tmp_path: Path) -> None:
    text = TextLoss(passages=1, length=16, text="w1 w2 w3 w4 w5 w6 w7 w8 " * 9)
    names = list(evaluate(llama, text, [AblateHeads([(0, 1)])] * 3, controls=1, progress=False).scores("text_loss"))
    assert [name for name in names if not name.startswith("random")][1:] == [
        "ablate 1 heads (zero)",
        "ablate 1 heads (zero) #2",
        "ablate 1 heads (zero) #3",
    ]
    (tmp_path / "evaluation.json").write_text("mine")
    with pytest.raises(HeadscopeError, match="without its journal"):
        evaluate(llama, text, out=tmp_path, progress=False)
    with pytest.raises(HeadscopeError, match="without its journal"):
        journal_in(tmp_path)  # where masking asks, too
    assert (tmp_path / "evaluation.json").read_text() == "mine"
