"""The result of an evaluation: per-trial scores and their paired comparisons."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.multiple import Family, with_holm
from headscope.interp.results.paired import crossed_interval, mean_interval, permutation_p
from headscope.interp.runs.sealed import read_beside, unsealed, write_results

FORMAT = 2
TRIALS = "evaluation.parquet"
COLUMNS = ("task", "condition", "kind", "of", "trial", "score")
RANDOM_HEADS, RANDOM_VECTORS, RANDOM_CHOICE = "random heads", "random vectors", "random choice"  # kinds of control


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per-trial scores of every condition.

    ``trials``: a table with task, condition, kind (baseline, intervention, control), of, control (which kind), trial,
    score and whatever the task said of a trial (``group``: which trials are not independent of each other).
    ``metrics``: what each task's score means; ``higher_is_better``: its direction (None where a task does not say).
    Trials are paired: every condition ran the same ones. ``details``: what tasks say of a condition beside its mean,
    one dict a task and condition (see ``details.tables``).
    """

    trials: pd.DataFrame
    metrics: dict[str, str]
    provenance: dict[str, Any]
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_rows(
        cls,
        rows: list[dict[str, Any]],
        metrics: dict[str, str],
        provenance: dict[str, Any],
        higher_is_better: dict[str, bool | None] | None = None,
    ) -> Evaluation:
        """An evaluation from one dict a trial."""
        return cls(pd.DataFrame(rows), metrics, provenance, higher_is_better or {})

    def scores(self, task: str) -> pd.DataFrame:
        """Scores of a task: one row a trial, one column a condition, in the order they ran."""
        part = self.trials[self.trials["task"] == task]
        order = list(dict.fromkeys(part["condition"]))
        return part.pivot(index="trial", columns="condition", values="score")[order]

    def groups(self, task: str) -> NDArray[np.int64] | None:
        """A label for every trial of a task, in the order of ``scores``: trials of one ``group`` (a column that a task
        may give: orders of one question, depths of one needle) are not independent of each other. None: all are."""
        part = self.trials[self.trials["task"] == task]
        if "group" not in part or part["group"].isna().all():
            return None
        named = part.drop_duplicates("trial").set_index("trial")["group"].sort_index()
        labels: NDArray[np.int64] = pd.factorize(named)[0].astype(np.int64)
        alone = np.flatnonzero(labels < 0)
        labels[alone] = labels.max() + 1 + np.arange(len(alone))
        return labels

    def summary(self, family: Family = "tasks") -> pd.DataFrame:
        """One row a condition: mean score, its difference from no edit, both with 95 % intervals (``mean_interval``).

        ``p_permutation`` tests the difference (``permutation_p``); ``p_holm`` adjusts it by Holm's method over the
        tasks of one condition, or with ``family="tasks and conditions"`` over all rows of a kind (all interventions).
        Where a task names its trials' groups, these are resampled and turned as wholes.

        Columns: task, condition, kind, of, mean, ci_low, ci_high, delta, delta_low, delta_high, p_permutation, p_holm,
        n (trials), groups (independent ones), higher_is_better.
        """
        rows = []
        kinds = self.trials.drop_duplicates("condition").set_index("condition")
        for task in self.metrics:
            scores, groups = self.scores(task), self.groups(task)
            values = scores.to_numpy(dtype=np.float64)  # (trial, condition)
            deltas = values - values[:, :1]
            (low, high), (delta_low, delta_high) = mean_interval(values, groups), mean_interval(deltas, groups)
            p = permutation_p(deltas, groups)
            for at, condition in enumerate(scores):
                rows.append(
                    {
                        "task": task,
                        "condition": condition,
                        "kind": kinds.loc[condition, "kind"],
                        "of": kinds.loc[condition, "of"],
                        "mean": values[:, at].mean(),
                        "ci_low": low[at],
                        "ci_high": high[at],
                        "delta": deltas[:, at].mean(),
                        "delta_low": delta_low[at],
                        "delta_high": delta_high[at],
                        "p_permutation": p[at] if at else float("nan"),
                        "n": len(values),
                        "groups": len(values) if groups is None else len(np.unique(groups)),
                        "higher_is_better": self.higher_is_better.get(task),
                    }
                )
        by = ["condition"] if family == "tasks" else ["kind"]
        return with_holm(pd.DataFrame(rows), "p_permutation", by, after="p_permutation")

    def contrasts(self, family: Family = "tasks") -> pd.DataFrame:
        """Each intervention against its random controls, each kind of ``control`` apart: random heads of the same
        layers, random vectors of the same norms in the same heads, or as many random heads or tokens in place of those
        that an edit chooses for each prompt.

        ``difference`` is the mean over trials of (intervention - mean of the controls); its interval resamples trials
        and control sets together (``crossed_interval``). ``rank`` is how many of the ``controls`` sets score at or
        below the intervention. ``p_lower`` = (1 + rank) / (1 + controls) is the Monte-Carlo probability of a random set
        scoring as low, ``p_higher`` that of one scoring as high, ``p_two_sided`` twice the smaller (at most 1), and
        ``p_worse`` the tail on the metric's bad side (NaN where its direction is not known). The +1 counts the
        intervention itself (Phipson and Smyth 2010, arXiv 1603.05766), so that no tail is below ``p_least`` =
        1 / (1 + controls), and no ``p_two_sided`` below twice that: more controls show smaller ones. ``p_holm``
        adjusts ``p_two_sided`` over the tasks of one condition, or with ``family="tasks and conditions"`` over all
        rows of a kind of control.
        """
        rows = []
        for task in self.metrics:
            scores, groups = self.scores(task), self.groups(task)
            for (condition, control), columns in self._controls().items():
                edit = scores[condition].to_numpy(dtype=np.float64)
                drawn = scores[columns].to_numpy(dtype=np.float64)  # (trial, control)
                low, high = crossed_interval(edit[:, None] - drawn, groups)
                rank, above = (int(side.sum()) for side in (drawn.mean(0) <= edit.mean(), drawn.mean(0) >= edit.mean()))
                least = 1 / (1 + drawn.shape[1])
                lower, higher = (1 + rank) * least, (1 + above) * least
                better = self.higher_is_better.get(task)
                rows.append(
                    {
                        "task": task,
                        "condition": condition,
                        "control": control,
                        "intervention": edit.mean(),
                        "random": drawn.mean(),
                        "difference": (edit[:, None] - drawn).mean(),
                        "low": low,
                        "high": high,
                        "rank": rank,
                        "controls": drawn.shape[1],
                        "p_lower": lower,
                        "p_higher": higher,
                        "p_two_sided": min(1.0, 2 * min(lower, higher)),
                        "p_worse": float("nan") if better is None else lower if better else higher,
                        "p_least": least,
                        "n": len(edit),
                        "higher_is_better": better,
                    }
                )
        by = ["condition", "control"] if family == "tasks" else ["control"]
        return with_holm(pd.DataFrame(rows), "p_two_sided", by, after="p_two_sided")

    def _controls(self) -> dict[tuple[str, str], list[str]]:
        """The controls of every intervention, by the intervention and the kind of control."""
        found: dict[tuple[str, str], list[str]] = {}
        controls = self.trials[self.trials["kind"] == "control"].drop_duplicates("condition")
        for _, row in controls.iterrows():
            kind = row.get("control")
            kind = kind if isinstance(kind, str) and kind else RANDOM_HEADS  # tables of before there were others
            found.setdefault((row["of"], kind), []).append(row["condition"])
        return found

    def save(self, folder: str | Path) -> Path:
        """Write ``evaluation.json`` (summary, contrasts, provenance) and ``evaluation.parquet`` (trials).

        The JSON carries its own checksum and the table's, and ``load`` refuses files that were changed.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        folder = Path(folder)
        document = {
            "format": FORMAT,
            "metrics": self.metrics,
            "higher_is_better": {task: self.higher_is_better.get(task) for task in self.metrics},
            "summary": json.loads(self.summary().to_json(orient="records")),
            "contrasts": json.loads(self.contrasts().to_json(orient="records")),
            "details": self.details,
            "provenance": self.provenance,
        }
        path = folder / "evaluation.json"
        write_results(path, document, {TRIALS: self.trials.to_parquet(index=False)})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what ``save`` wrote.

        Raises:
            HeadscopeError: nothing there, not an evaluation, or one that was changed.
        """
        path = Path(folder) / "evaluation.json"
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != FORMAT:
                raise HeadscopeError(f"{folder}: an evaluation of format {document['format']}, this reads {FORMAT}")
            document = unsealed(document)
            trials = pd.read_parquet(io.BytesIO(read_beside(path, document, TRIALS)))
            missing = set(COLUMNS) - set(trials)
            if missing or trials.empty:
                raise ValueError(f"no column {', '.join(sorted(missing))}" if missing else "no trials")
            if not set(document["metrics"]) <= set(trials["task"]):
                raise ValueError("a task has no trials")
            trials = trials.astype({"score": np.float64})
            directions = {task: document["higher_is_better"][task] for task in document["metrics"]}
            details = [dict(one) for one in document.get("details", ())]
            return cls(trials, dict(document["metrics"]), dict(document["provenance"]), directions, details)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise HeadscopeError(f"{folder} holds no evaluation ({error}); run `headscope evaluate` first") from error
