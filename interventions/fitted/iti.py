"""ITI: push the heads that know the truth along the direction of truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import hash_texts, provenance
from headscope.interp.sites.given import ModelLike
from headscope.interventions.applying import size
from headscope.interventions.fitted.base import Data, Fit, Fitted, every_head, how_many
from headscope.interventions.fitted.data import answers
from headscope.interventions.outputs.add import AddToHeads
from headscope.probes.linear.activations import head_outputs
from headscope.probes.linear.dataset import Labelled
from headscope.probes.linear.fitting import Settings, fit_heads
from headscope.probes.linear.heads import spread, unit

LEGACY = 4  # tokens after the question that the authors' multiple-choice code leaves unshifted ("\nA:")


@dataclass(frozen=True, kw_only=True)
class ITI(Fit):
    """Add to the heads whose outputs tell true from false a step towards true: inference-time intervention.

    Li et al. 2023 (arXiv 2306.03341, Section 3; ``utils.py``, ``validation/validate_2fold.py``). Of every text
    ``"Q: {question} A: {choice}"`` each head's output z at the last token is kept. Questions are split 80/20 by
    ``np.random.choice`` with ``seed``; a logistic regression a head (scikit-learn, max_iter 1000) is fitted to the
    training part, its accuracy on the other is the head's score, and the ``top`` heads are taken, ties in the model's
    order. Each is pushed along theta, the difference of the means of z over true and false texts of both parts, in
    float64 and brought to length 1, by ``alpha`` * sigma, sigma being the standard deviation of z . theta. Data are
    rows {"question", "choices", "labels"} or {"text", "label"}, or a labelled set of ``headscope.probes``.

    What differs: the authors take sigma over another set of prompts, ``tqa_gen_end_q``, test questions among them:
    name one by ``sigma_texts``; by default it is taken over the texts themselves. One call fits one fold.

    What it does not show: that the heads are what makes the model truthful, or that accuracy is not read off the words
    of the answers (``headscope probe`` has the controls); the best of many heads is best by luck, too. 48 heads are 5 %
    of the 1,024 of a model of 7 billion parameters: on a small one take ``share=0.046875``.

    Args:
        top: how many heads are pushed.
        share: the same as a share of all heads, cut to a whole number; it goes before ``top``.
        alpha: the edit's ``strength``, in sigmas.
        direction: "mass_mean", or "probe_weight", the logistic regression's weights brought to length 1.
        ddof: sigma's divisor is n - ddof: 1 as the authors' evaluation has it (torch.std), or 0 as their
            ``get_interventions_dict`` (np.std).
        sigma_texts: texts whose last token gives sigma: a list, or a file with one a line. None: the data's.
        form: which rows are pushed: "generation", the prompt's last and every generated one, or "legacy", the authors'
            older code for multiple choice: every row from 4 tokens after the prompt, which is the question alone, on.
        validation: share of the questions that are held out.
        max_iter: of the logistic regressions.
        batch: texts of a forward pass.
    """

    name: ClassVar[str] = "iti"
    unit: ClassVar[str] = "validation accuracy"
    source: ClassVar[str] = "arXiv 2306.03341"

    top: int = 48
    share: float | None = None
    alpha: float = 15.0
    direction: Literal["mass_mean", "probe_weight"] = "mass_mean"
    ddof: int = 1
    sigma_texts: Sequence[str] | str | Path | None = None
    form: Literal["generation", "legacy"] = "generation"
    validation: float = 0.2
    max_iter: int = 1000
    batch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"direction": ("mass_mean", "probe_weight"), "form": ("generation", "legacy"), "ddof": (0, 1)}
        for field, (one, other) in known.items():
            if getattr(self, field) not in (one, other):
                raise HeadscopeError(f"iti: {field} is {one!r} or {other!r}, not {getattr(self, field)!r}")
        Settings((self.seed,), self.validation, self.max_iter)

    def fit(self, model: ModelLike, data: Data | Labelled, *, progress: bool = True) -> ITIResult:
        """The edit (an ``AddToHeads``) that the data ask for.

        Raises:
            HeadscopeError: data of another form, a part that lacks a label, more heads than there are, or too few texts
                for sigma.
        """
        lm, labelled = load_model(model), answers(data)
        count = how_many("iti", self.top, self.share, len(every_head(lm)))
        told = self._sigma_texts()
        parts = question_split(labelled, self.seed, self.validation)
        z = head_outputs(lm, labelled.texts, batch_size=self.batch, progress=progress)
        shape = (z.shape[1], z.shape[2])
        if shape != size(lm):
            raise HeadscopeError(f"iti: {lm.name} has layers without attention, whose heads cannot be told apart here")
        x = z.reshape(len(z), shape[0] * shape[1], -1)
        settings = Settings((self.seed,), self.validation, self.max_iter)
        probes = fit_heads(x, labelled.labels, parts, settings)
        scores = self._scores(labelled, parts[1], probes.correct, shape)
        along = unit(probes.weight) if self.direction == "probe_weight" else mass_mean(x, labelled.labels)
        if told is not None:
            read = head_outputs(lm, told, batch_size=self.batch, progress=progress)
            x = read.reshape(len(read), shape[0] * shape[1], -1)
        sigma = spread(x.astype(np.float64), along, self.ddof).reshape(shape)
        directions = along.reshape(*shape, -1)
        rows: dict[str, Any] = {"during": "decode", "after": LEGACY} if self.form == "legacy" else {"during": "answer"}
        edit = AddToHeads(
            scores.top(count),
            torch.from_numpy(directions.astype(np.float32)),
            sigma=torch.from_numpy(sigma.astype(np.float32)),
            strength=float(self.alpha),
            **rows,
        )
        made = provenance(lm, seed=self.seed, prompts=labelled.texts, **self._told(), unconverged=probes.unconverged)
        made["data"] = {"name": labelled.name, "texts": len(labelled), "questions": len(set(labelled.groups))}
        made["data"]["sha256"], made["sigma_sha256"] = labelled.sha256, None if told is None else hash_texts(told)
        return ITIResult(edit=edit, provenance=made, scores=scores, directions=directions, sigma=sigma)

    def _told(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("seed", "sigma_texts")}

    def _sigma_texts(self) -> list[str] | None:
        given = self.sigma_texts
        if isinstance(given, str | Path):
            try:
                given = Path(given).read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise HeadscopeError(f"cannot read the texts of sigma_texts ({error}); give one a line") from error
        found = None if given is None else [text for text in given if text.strip()]
        if found is not None and len(found) < 2:
            raise HeadscopeError("a standard deviation needs two texts or more in sigma_texts")
        return found

    def _scores(
        self, labelled: Labelled, held_out: NDArray[np.int64], correct: NDArray[np.bool_], shape: tuple[int, int]
    ) -> HeadScores:
        """Whether each head's probe is right on each text that was held out; intervals resample questions."""
        trials = correct.astype(np.float64).reshape(len(held_out), *shape)
        details = tuple({"example": int(i), "group": labelled.groups[i]} for i in held_out)
        return HeadScores(f"iti_{labelled.name}", trials, {}, labelled.group_index[held_out], details)


@dataclass(frozen=True, kw_only=True, eq=False)
class ITIResult(Fitted):
    """The edit, and what it is made of, for all heads of the model.

    Attributes:
        scores: validation accuracy of every head's probe, with n and intervals over questions.
        directions: theta, float64 (layer, head, d_head), of length 1 (0 for a head whose means agree).
        sigma: standard deviation of z along theta, float64 (layer, head).
    """

    scores: HeadScores
    directions: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @property
    def heads(self) -> HeadSet:
        """The heads that are pushed, the most accurate first."""
        assert self.edit.heads is not None
        return self.edit.heads

    @property
    def tied(self) -> int:
        """How many heads that are not pushed have the last chosen one's accuracy: only their place left them out."""
        mean, last = self.scores.mean, self.scores.mean[self.heads[-1]]
        return int((mean == last).sum()) - sum(bool(mean[head] == last) for head in self.heads)

    def summary(self) -> dict[str, Any]:
        """Heads, accuracies of the first and the last, n, ties at the edge, mean sigma of the heads."""
        accuracy = [float(self.scores.mean[head]) for head in self.heads]
        return {
            "heads": [list(head) for head in self.heads],
            "accuracy_first": accuracy[0],
            "accuracy_last": accuracy[-1],
            "n": int(self.scores.n.max()),
            "tied_with_last": self.tied,
            "sigma_mean": float(np.mean([self.sigma[head] for head in self.heads])),
        }

    def record(self) -> dict[str, Any]:
        """With every head's accuracy and sigma."""
        return {**super().record(), "accuracy": self.scores.mean.tolist(), "sigma": self.sigma.tolist()}


def question_split(labelled: Labelled, seed: int, validation: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation texts (indices), whole questions, as the authors draw them: ``np.random.choice`` of
    int(n (1 - validation)) questions, counted in the order of the data.

    Raises:
        HeadscopeError: a part that lacks a label.
    """
    questions = list(dict.fromkeys(labelled.groups))
    count = int((1 - Fraction(str(validation))) * len(questions))  # truncated, as there; exact in decimals
    drawn = np.random.RandomState(seed).choice(len(questions), size=count, replace=False)
    training = {questions[i] for i in drawn}
    mine = np.array([group in training for group in labelled.groups])
    for side in (mine, ~mine):
        if set(labelled.labels[side].tolist()) != {0, 1}:
            raise HeadscopeError(
                f"{labelled.name}: with seed {seed} a part of the questions has texts of one label alone, or none; "
                "give more questions, or another seed or validation"
            )
    return np.flatnonzero(mine), np.flatnonzero(~mine)


def mass_mean(x: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of x (example, head, d) where the label is 1 less that where it is 0, of length 1: (head, d), float64
    (in float32 the unit vector of a head that hardly carries anything would be off by 1e-3)."""
    x = x.astype(np.float64)
    return unit(x[labels == 1].mean(axis=0) - x[labels == 0].mean(axis=0))
