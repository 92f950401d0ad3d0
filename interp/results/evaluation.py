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
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.runs.sealed import read_beside, unsealed, write_results

FORMAT = 2
TRIALS = "evaluation.parquet"
COLUMNS = ("task", "condition", "kind", "of", "trial", "score")
LEVEL, RESAMPLES = 0.95, 4000


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per-trial scores of every condition.

    ``trials``: a table with task, condition, kind (baseline, intervention, control), of, trial, score and whatever the
    task said of a trial. ``metrics``: what each task's score means; ``higher_is_better``: its direction (None where a
    task does not say). Trials are paired: every condition ran the same ones. ``details``: what tasks say of a condition
    beside its mean, one dict a task and condition (see ``details.tables``).
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

    def summary(self) -> pd.DataFrame:
        """One row a condition: mean score, its difference from no edit, both with paired 95 % bootstrap intervals.

        Columns: task, condition, kind, of, mean, ci_low, ci_high, delta, delta_low, delta_high, n, higher_is_better.
        """
        rows = []
        kinds = self.trials.drop_duplicates("condition").set_index("condition")
        for task in self.metrics:
            scores = self.scores(task)
            base = scores.iloc[:, 0].to_numpy(dtype=np.float64)
            for condition in scores:
                values = scores[condition].to_numpy(dtype=np.float64)
                low, high = _interval(values)
                delta_low, delta_high = _interval(values - base)
                rows.append(
                    {
                        "task": task,
                        "condition": condition,
                        "kind": kinds.loc[condition, "kind"],
                        "of": kinds.loc[condition, "of"],
                        "mean": values.mean(),
                        "ci_low": low,
                        "ci_high": high,
                        "delta": (values - base).mean(),
                        "delta_low": delta_low,
                        "delta_high": delta_high,
                        "n": len(values),
                        "higher_is_better": self.higher_is_better.get(task),
                    }
                )
        return pd.DataFrame(rows)

    def contrasts(self) -> pd.DataFrame:
        """Each intervention against its random-head controls.

        ``difference`` is the mean over trials of (intervention - mean of the controls); its interval resamples trials
        and control sets together (both are samples). ``rank`` is how many of the ``controls`` sets score at or below
        the intervention. ``p_lower`` = (1 + rank) / (1 + controls) is the Monte-Carlo probability of a random set
        scoring as low, ``p_higher`` that of one scoring as high, ``p_two_sided`` twice the smaller (at most 1), and
        ``p_worse`` the tail on the metric's bad side (NaN where its direction is not known). The +1 counts the
        intervention itself (Phipson and Smyth 2010, arXiv 1603.05766), so that no tail is below ``p_least`` =
        1 / (1 + controls), and no ``p_two_sided`` below twice that: more controls show smaller ones.
        """
        rows = []
        for task in self.metrics:
            scores = self.scores(task)
            for condition, columns in self._controls().items():
                edit = scores[condition].to_numpy(dtype=np.float64)
                drawn = scores[columns].to_numpy(dtype=np.float64)  # (trial, control)
                low, high = _two_way_interval(edit[:, None] - drawn)
                rank, above = (int(side.sum()) for side in (drawn.mean(0) <= edit.mean(), drawn.mean(0) >= edit.mean()))
                least = 1 / (1 + drawn.shape[1])
                lower, higher = (1 + rank) * least, (1 + above) * least
                better = self.higher_is_better.get(task)
                rows.append(
                    {
                        "task": task,
                        "condition": condition,
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
        return pd.DataFrame(rows)

    def _controls(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        controls = self.trials[self.trials["kind"] == "control"].drop_duplicates("condition")
        for _, row in controls.iterrows():
            found.setdefault(row["of"], []).append(row["condition"])
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


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = bootstrap_mean(values[:, None], level=LEVEL, resamples=RESAMPLES)
    return float(low[0]), float(high[0])


def _two_way_interval(differences: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the grand mean of (trial, control), resampling both axes; NaN below two trials."""
    trials, controls = differences.shape
    if trials < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(trials, np.full(trials, 1 / trials), size=RESAMPLES) / trials
    columns = rng.multinomial(controls, np.full(controls, 1 / controls), size=RESAMPLES) / controls
    means = np.einsum("rt,tc,rc->r", rows, differences, columns)
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)
