"""The masking experiment of Wu et al. 2024: needle recall without k retrieval heads, or without k random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.evaluation import RANDOM_HEADS, Evaluation
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interventions.applying import apply, size
from headscope.interventions.evaluation.evaluate import BASELINE, CONTROL, EDIT, FILES, journal_in, row
from headscope.interventions.outputs.ablate import AblateHeads
from headscope.interventions.tasks.needle import NeedleTask

PROTOCOL = "Wu et al. 2024, arXiv 2404.15574, needle_in_haystack_with_mask.py"
LISTED = 100  # heads that their script reads of a list
LENGTHS = tuple(int(n) for n in np.round(np.linspace(1000, 128000, 40)))
Random = Literal["published", "others"]


@dataclass(frozen=True)
class Arm:
    """One way to run the trials: unmasked (``k`` 0), without the top ``k``, or without ``k`` random ones (``draw``)."""

    k: int = 0
    draw: int | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        if not self.k:
            return "no edit"
        return f"top {self.k}" if self.draw is None else f"random {self.k} (draw {self.draw})"

    @property
    def kind(self) -> str:
        """Baseline, intervention, or the control of one."""
        return BASELINE if not self.k else EDIT if self.draw is None else CONTROL

    @property
    def of(self) -> str:
        """Which arm it is the control of, if it is one."""
        return "" if self.draw is None else Arm(self.k).name

    def labels(self) -> dict[str, str]:
        """Its columns in a table of trials, beside its name."""
        return {"kind": self.kind, "of": self.of, "control": RANDOM_HEADS if self.kind == CONTROL else ""}


def needle_task(lm: LanguageModel, scale: Literal["small", "published"] = "small", **given: Any) -> NeedleTask:
    """The trials: their needle (the sandwich), answers of at most 50 tokens that end at a newline.

    "published": those of their 40 lengths from 1,000 to 128,000 tokens that fit the model, at ten depths. "small"
    [OURS]: four depths of 600 tokens, for a CPU. ``given`` are settings of ``NeedleTask`` that replace these.
    """
    if scale not in ("small", "published"):
        raise HeadscopeError(f"scale is 'small' or 'published', not {scale!r}")
    limit = lm.info.context_length
    fits = [n for n in LENGTHS if limit is None or n + 50 <= limit]
    chosen: dict[str, Any] = {"lengths": [600], "depths": 4}
    if scale == "published":
        chosen = {"lengths": fits, "depths": 10}
    return NeedleTask(**{"needles": ["sandwich"], "newline_stop": True, **chosen, **given})


def masking(
    lm: Loadable,
    heads: HeadScores | HeadSet,
    ks: Sequence[int] = (5, 10, 30),
    *,
    task: NeedleTask | None = None,
    random: Random = "published",
    draws: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Needle recall unmasked, without the ``k`` highest heads and without ``k`` random ones, for every k.

    The protocol of Wu et al. 2024 (arXiv 2404.15574, property 5; needle_in_haystack_with_mask.py): the prompt is read
    unmasked without its last token; from that token on every row is masked, the one that chooses the first token of the
    answer included. To mask a head is to zero its query, so that it attends uniformly: it still writes the mean of its
    values (``AblateHeads(heads, "uniform", during="answer")``). Heads are ranked by their mean score; at most 100 of a
    list are read. Random heads are drawn from all layers and heads alike, anew for every trial, and retrieval heads may
    be among them: the code's test that was to leave them out never holds. The score is ROUGE-1 recall of the needle's
    answer (theirs is 100 times that).

    What differs from ``evaluate``: its controls are drawn once, of the same layers, and hold none of the masked heads.

    What differs from the code: draws are seeded; layers and heads are the model's (theirs are 32 and 32); an answer
    also ends at a token that ends a text; words are not stemmed unless the task's ``stem`` is given; prompts are those
    of ``NeedlePrompts``, from the bundled novel.

    Args:
        lm: load_model's result, or what load_model takes.
        heads: head scores (a list of theirs: ``from_retrieval_head``), or heads in their order.
        ks: how many to mask; their README compares 30.
        task: the trials (None: ``needle_task(lm)``).
        random: "published", or "others", which leaves out the listed heads, as the paper says and the code meant.
        draws: random conditions for every k; theirs is one.
        out: folder for ``evaluation.json``, the per-trial table and the journal that makes the run resumable.

    Returns:
        An Evaluation: conditions "no edit", "top K" and its controls "random K (draw i)"; a trial's ``masked`` lists
        the heads that were masked in it.

    Raises:
        HeadscopeError: a k that the heads do not have, or too few other heads.
    """
    out = folder_of(out)
    ranked = heads.top(min(LISTED, int((heads.n > 0).sum()))) if isinstance(heads, HeadScores) else heads[:LISTED]
    model = load_model(lm)
    layers, count = size(model)
    ranked.check(layers, count)
    _check(ranked, ks, draws, random, layers * count)
    task = needle_task(model) if task is None else task
    trials = task.trials(model)
    arms = [Arm(), *(Arm(k, draw) for k in ks for draw in (None, *range(draws)))]
    work = [(arm, index) for arm in arms for index in range(len(trials))]
    chosen: dict[str, Any] = {
        "ks": list(ks),
        "random": random,
        "draws": draws,
        "protocol": PROTOCOL,
        "heads": list(ranked),
    }
    made = provenance(model, seed=seed, tasks={task.name: task.parameters(model)}, **chosen)
    config: dict[str, Any] = {key: made[key] for key in ("model", "parameters", "seed")} | {"trials": trials}
    announce((task.tokens(model, trials[index]) for _, index in work), list(FILES) if out is not None else [])

    def step(number: int) -> dict[str, Any]:
        arm, index = work[number]
        masked = _masked(arm, ranked, (layers, count), random, [seed, arm.k, arm.draw or 0, index])
        return {**_run(model, task, trials[index], masked), "masked": ",".join(masked)}

    with opened(journal_in(out), config) as journal:
        results = run_steps(journal, len(work), step, "mask", progress=progress)
    rows = [
        row(
            {"task": task.name, "condition": arm.name, **arm.labels(), "trial": index},
            trials[index],
            found,
        )
        for (arm, index), found in zip(work, results, strict=True)
    ]
    result = Evaluation.from_rows(rows, {task.name: task.metric}, made, {task.name: task.higher_is_better})
    if out is not None:
        result.save(out)
    return result


def _check(ranked: HeadSet, ks: Sequence[int], draws: int, random: str, every: int) -> None:
    if random not in ("published", "others"):
        raise HeadscopeError(f"random is 'published' or 'others', not {random!r}")
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks) or draws < 1:
        raise HeadscopeError(f"ks are different numbers of heads, and draws is at least 1; got {list(ks)} and {draws}")
    if max(ks) > len(ranked):
        raise HeadscopeError(f"k={max(ks)} of {len(ranked)} listed heads (at most {LISTED} are read): ask for fewer")
    if random == "others" and max(ks) > every - len(ranked):
        raise HeadscopeError(
            f"{every - len(ranked)} heads are not in the list, too few for k={max(ks)}: give a shorter list, such as "
            "scores.above(0.1), or random='published'"
        )


def _masked(arm: Arm, ranked: HeadSet, shape: tuple[int, int], random: str, seed: Sequence[int]) -> list[str]:
    """The names of the heads that are masked in a trial."""
    if arm.draw is None:
        return [f"L{layer}H{head}" for layer, head in ranked[: arm.k]]
    barred = set(ranked) if random == "others" else set()
    free = [(layer, head) for layer in range(shape[0]) for head in range(shape[1]) if (layer, head) not in barred]
    drawn = np.random.default_rng(list(seed)).choice(len(free), size=arm.k, replace=False)
    return [f"L{layer}H{head}" for layer, head in (free[i] for i in drawn)]


def _run(lm: LanguageModel, task: NeedleTask, trial: Trial, masked: Sequence[str]) -> dict[str, Any]:
    if not masked:
        return task.run(lm, trial)
    with apply(lm, AblateHeads(HeadSet.of(list(masked)), "uniform", during="answer")):
        return task.run(lm, trial)
