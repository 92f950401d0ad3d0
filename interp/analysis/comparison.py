"""What several runs of ``discover`` allow to be compared: methods on one model, or one method on several models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from headscope.interp.analysis.agreement import Agreement, agree, closest_first
from headscope.interp.analysis.depth import by_depth, distribution_distance
from headscope.interp.analysis.difference import Difference, contrast
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import COMPARED, HeadScores
from headscope.interp.runs.provenance import versions
from headscope.interp.runs.sealed import write_results

FORMAT, KIND = 1, "headscope comparison"
SHAPES = (
    "the models have different shapes, so no head of one is a head of the other; where both have as many layers and "
    "one tokenizer, headscope.interp.heads.position.matching (head_distances, match_heads) says which heads are alike"
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What ``compare`` found.

    ``scores`` by the name each is given in the tables. ``agreement``: of several methods on one model. ``differences``:
    of one method on models of one shape. ``depth``: the table of ``by_depth``, of one method on models of different
    shapes (empty without). ``notes``: what was left out, and why.
    """

    scores: Mapping[str, HeadScores]
    agreement: Agreement | None
    differences: tuple[Difference, ...]
    depth: pd.DataFrame
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        parts = [repr(self.agreement)] if self.agreement else []
        parts += [repr(one) for one in self.differences]
        parts += [f"{self.depth['run'].nunique()} models by depth"] if len(self.depth) else []
        return f"Comparison({', '.join(parts)})"

    def pairs(self) -> pd.DataFrame:
        """Every pair beside its nulls, those that agree most first: the rows of ``Agreement.to_frame``, led by the
        method where there is one."""
        found = [] if self.agreement is None else [self.agreement.to_frame()]
        for one in self.differences:
            frame = one.agreement.to_frame()
            frame.insert(0, "method", one.method)
            found.append(frame)
        return closest_first(pd.concat(found, ignore_index=True)) if found else pd.DataFrame()

    def heads(self) -> pd.DataFrame:
        """A row a head: the change of every method that was run twice, or the ranks of all heads by every method."""
        if self.agreement is not None:
            return self.agreement.ranks(self.agreement.heads)
        found = []
        for one in self.differences:
            frame = one.to_frame()
            for place, (name, value) in enumerate(zip(("method", "from", "to"), (one.method, *one.names), strict=True)):
                frame.insert(place, name, value)
            found.append(frame)
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def document(self) -> dict[str, Any]:
        """Everything as JSON, a head's rows left to the tables."""
        runs = [
            {"name": name, "method": one.method, "layers": one.layers, "heads": one.heads, "trials": len(one.trials)}
            | {key: one.provenance.get(key) for key in ("model", "parameters", "seed", "created")}
            for name, one in self.scores.items()
        ]
        used = [one.agreement for one in self.differences] + ([self.agreement] if self.agreement else [])
        settings = [{"k": a.k, "permutations": a.permutations, "seed": a.seed, "left_out": a.left_out} for a in used]
        return {
            "format": FORMAT,
            "kind": KIND,
            "runs": runs,
            "settings": settings[:1],  # the same for all
            "pairs": json.loads(self.pairs().to_json(orient="records")),
            "shared": {} if self.agreement is None else self.agreement.shared_names(),
            "differences": [one.document() for one in self.differences],
            "depth": json.loads(self.depth.to_json(orient="records")),
            "notes": list(self.notes),
            "versions": versions(),
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``compare.json`` and, where they have rows, the tables ``compare_pairs``, ``compare_heads`` and
        ``compare_depth`` as CSV and Parquet; returns the JSON's path.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        tables = {"pairs": self.pairs(), "heads": self.heads(), "depth": self.depth}
        beside = {}
        for name, frame in tables.items():
            if len(frame):
                beside[f"{COMPARED}{name}.csv"] = frame.to_csv(index=False).encode()
                beside[f"{COMPARED}{name}.parquet"] = frame.to_parquet(index=False)
        path = Path(folder) / "compare.json"
        write_results(path, self.document(), beside)
        return path


def compare(
    runs: Mapping[str, Sequence[HeadScores]], *, k: int | None = None, permutations: int | None = None, seed: int = 0
) -> Comparison:
    """Compare what ``discover`` found in several runs.

    Methods that several runs have are compared between runs, each run with the first that has it: head by head
    (``contrast``) where the models have one shape, else by relative depth (``by_depth``). Where no two runs have a
    method in common, all methods are compared with each other (``agree``), which has to be on one model.

    Args:
        runs: scores by the run's name.
        k, permutations, seed: of ``agree``.

    Raises:
        HeadscopeError: fewer than two scores, or different methods on different models.
    """
    held = [(run, one) for run, found in runs.items() for one in found]
    by_method: dict[str, list[tuple[str, HeadScores]]] = {}
    for run, one in held:
        by_method.setdefault(one.method, []).append((run, one))
    settings: dict[str, Any] = {"k": k, "permutations": permutations, "seed": seed}
    if len(held) < 2:
        raise HeadscopeError("there are fewer than two head scores to compare: give two runs, or one of two methods")
    repeated = {method: found for method, found in by_method.items() if len(found) > 1}
    if not repeated:
        _check_one_model(held)
        scores = {one.method: one for _, one in held}
        return Comparison(scores, agree(list(scores.values()), **settings), (), pd.DataFrame(), ())
    notes = [f"{method} is in one run alone and was left out" for method in by_method if method not in repeated]
    changes, depths = [], []
    for method, found in repeated.items():
        (first, reference), *others = found
        alike = [(run, one) for run, one in others if one.mean.shape == reference.mean.shape]
        changes += [contrast(reference, one, names=(first, run), **settings) for run, one in alike]
        if len(alike) < len(others):
            depths.append(by_depth([one for _, one in found], [run for run, _ in found]))
            apart = [(run, distribution_distance(reference, one)) for run, one in others if (run, one) not in alike]
            notes += [f"{method}, {first} and {run}: distributions of scores at most {d:.2f} apart" for run, d in apart]
    notes += [SHAPES] if depths else []
    scores = {f"{run}: {method}": one for method, found in repeated.items() for run, one in found}
    depth = pd.concat(depths, ignore_index=True) if depths else pd.DataFrame()
    return Comparison(scores, None, tuple(changes), depth, tuple(notes))


def model_of(scores: HeadScores) -> tuple[Any, ...]:
    """What tells the model of scores from others: name, revision, layers and heads."""
    told = scores.provenance.get("model")
    told = told if isinstance(told, dict) else {}
    return told.get("name"), told.get("revision"), scores.layers, scores.heads


def _check_one_model(held: Sequence[tuple[str, HeadScores]]) -> None:
    models = {model_of(one): (run, one) for run, one in held}
    if len(models) > 1:
        (run, one), (other, two) = list(models.values())[:2]
        raise HeadscopeError(
            f"{run} has {one.method} of {model_of(one)[0]}, {other} has {two.method} of {model_of(two)[0]}: compare "
            "one method on two models, or several methods on one"
        )
