"""Head scores: layer x head with confidence intervals over trials, and where they came from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.picture import svg_map
from headscope.interp.runs.sealed import read_beside, unsealed, write_results

FORMAT = 2
COMPARED = "compare_"  # begins the names of tables that compare scores
COLUMNS = ("trial", "layer", "head")  # of the table of trials, in the order of its rows


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Per-head scores of one discovery method.

    ``trials`` (trial, layer, head) holds one score per trial; NaN where a trial says nothing about a head. A head's
    score is the mean over its trials; the interval is a percentile bootstrap over trials (``level`` 0.95,
    ``resamples`` 2000, seeded), which describes these trials' sampling only, not other prompts or models.

    ``groups`` (trial,) names what was drawn independently (a seed, a needle): where given, whole groups are resampled.
    ``details`` describes every trial that was run, kept or not (length, depth, what the model answered ...).
    """

    method: str
    trials: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)
    groups: NDArray[np.int64] | None = None
    details: tuple[dict[str, Any], ...] = ()
    level: float = 0.95
    resamples: int = 2000

    def __post_init__(self) -> None:
        if self.trials.ndim != 3 or self.trials.shape[0] == 0:
            raise HeadscopeError(
                f"{self.method}: no trial was kept, so there is nothing to score; add trials or lengths"
            )

    def __repr__(self) -> str:
        """``HeadScores('induction', 24 layers x 16 heads, 50 trials, best L5H3 0.912)``."""
        return f"HeadScores({self._words()})"

    def _repr_html_(self) -> str:
        """A picture for notebooks; ``plots.head_map`` draws the interactive one."""
        return svg_map(self.mean, self._words())

    def _words(self) -> str:
        size = f"{self.method!r:.40}, {self.layers} layers x {self.heads} heads, {len(self.trials)} trials"
        if not self.n.any():
            return f"{size}, no score"
        layer, head = self.top(1)[0]
        return f"{size}, best L{layer}H{head} {self.mean[layer, head]:.3g}"

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.trials.shape[1])

    @property
    def heads(self) -> int:
        """Number of query heads a layer."""
        return int(self.trials.shape[2])

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Scores (layer, head); NaN for a head without trials."""
        with np.errstate(invalid="ignore"):  # 0 / 0: NaN where a head has no trial
            mean: NDArray[np.float64] = np.nansum(self.trials, axis=0) / self.n
        return mean

    @cached_property
    def n(self) -> NDArray[np.int64]:
        """Trials behind each score (layer, head)."""
        count: NDArray[np.int64] = np.sum(~np.isnan(self.trials), axis=0)
        return count

    @cached_property
    def interval(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bootstrap bounds (low, high), each (layer, head); NaN for a head with a single trial (or group)."""
        return bootstrap_mean(self.trials, self.groups, level=self.level, resamples=self.resamples)

    def top(self, k: int) -> HeadSet:
        """The ``k`` highest-scoring heads in descending order (ties in model order), weighted by their scores."""
        scored = int((self.n > 0).sum())
        if not 0 < k <= scored:
            raise HeadscopeError(f"top({k}) asks for heads that have no score; choose 1 to {scored}")
        order = np.argsort(-self.mean, axis=None, kind="stable")[:k]
        pairs = [(int(i) // self.heads, int(i) % self.heads) for i in order]
        weights = tuple(float(self.mean[pair]) for pair in pairs)
        return HeadSet(tuple(pairs), weights, name=f"{self.method} top {k}")

    def above(self, threshold: float) -> HeadSet:
        """Every head whose score is strictly above ``threshold``, in descending order."""
        count = int((self.mean > threshold).sum())
        return self.top(count) if count else HeadSet((), name=f"{self.method} above {threshold}")

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: layer, head, score, ci_low, ci_high, n, one row a head, highest score first."""
        low, high = self.interval
        layer, head = (np.asarray(index) for index in np.indices(self.mean.shape))
        columns: dict[str, NDArray[Any]] = {
            "layer": layer,
            "head": head,
            "score": self.mean,
            "ci_low": low,
            "ci_high": high,
            "n": self.n,
        }
        frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
        return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)

    def save(self, folder: str | Path, beside: Mapping[str, bytes] | None = None) -> Path:
        """Write ``METHOD.json`` and ``METHOD.parquet`` (every trial), each atomically; returns the JSON's path.

        The JSON carries its own checksum and the table's, and ``load`` refuses files that were changed. ``beside``
        holds further files (name -> contents) that belong to the scores: they are written and listed, too.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        folder = Path(folder)
        document = {
            "format": FORMAT,
            "method": self.method,
            "layers": self.layers,
            "heads_per_layer": self.heads,
            "level": self.level,
            "resamples": self.resamples,
            "heads": self.to_frame().to_dict("records"),
            "provenance": self.provenance,
            "trials": list(self.details),
        }
        path = folder / f"{self.method}.json"
        table = self._trial_frame().to_parquet(index=False)
        write_results(path, _plain(document), {f"{self.method}.parquet": table, **(beside or {})})
        return path

    def _trial_frame(self) -> pd.DataFrame:
        trial, layer, head = np.indices(self.trials.shape)
        group = np.arange(len(self.trials)) if self.groups is None else self.groups
        columns = {"trial": trial, "group": group[trial], "layer": layer, "head": head, "score": self.trials}
        return pd.DataFrame({name: values.ravel() for name, values in columns.items()})

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what ``save`` wrote, from the JSON file or the folder that holds a single one.

        Raises:
            HeadscopeError: no such file, several candidates, a file that is not head scores, or one that was changed.
        """
        path = _find_scores(Path(path))
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict) or "format" not in document:
                raise ValueError("it names no format")
            if document["format"] != FORMAT:
                raise HeadscopeError(f"{path}: head scores of format {document['format']}, this version reads {FORMAT}")
            document = unsealed(document)
            frame = pd.read_parquet(io.BytesIO(read_beside(path, document, f"{path.stem}.parquet")))
            trials, groups = _arrays(frame, int(document["layers"]), int(document["heads_per_layer"]))
            made, details = dict(document["provenance"]), tuple(dict(row) for row in document["trials"])
            level, resamples = float(document["level"]), int(document["resamples"])
            return cls(str(document["method"]), trials, made, groups, details, level, resamples)
        except (KeyError, ValueError, OSError, TypeError, ArithmeticError) as error:
            raise HeadscopeError(
                f"{path} is not a head-score file of headscope ({error}); run `headscope discover`"
            ) from error


def _arrays(frame: pd.DataFrame, layers: int, heads: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores (trial, layer, head) and groups (trial,) of a table with one row for each, in this order.

    Raises:
        ValueError: other rows.
    """
    shape = (len(frame) // max(1, layers * heads), layers, heads)
    if min(shape) < 1 or len(frame) != np.prod(shape):
        raise ValueError(f"{len(frame)} rows are not trials of {layers} x {heads} heads")
    for name, index in zip(COLUMNS, np.indices(shape), strict=True):
        if not np.array_equal(frame[name].to_numpy(), index.ravel()):
            raise ValueError(f"its rows are not in the order {', '.join(COLUMNS)}")
    groups = frame["group"].to_numpy(dtype=np.int64).reshape(shape)
    if (groups != groups[:, :1, :1]).any():
        raise ValueError("a trial is in several groups")
    return frame["score"].to_numpy(dtype=np.float64).reshape(shape), groups[:, 0, 0]


def _find_scores(path: Path) -> Path:
    if path.is_dir():
        found = [p for p in sorted(path.glob("*.json")) if p.with_suffix(".parquet").exists()]
        if len(found) != 1:
            names = ", ".join(p.name for p in found)
            what = f"{len(found)} head-score files ({names}); name one of them"
            none = "no head scores, which are a METHOD.json with its table METHOD.parquet beside it"
            raise HeadscopeError(f"{path} holds {what if found else none}")
        return found[0]
    if not path.exists():
        raise HeadscopeError(f"{path} does not exist; run `headscope discover METHOD --out FOLDER` first")
    return path


def find_all(folder: Path) -> dict[str, HeadScores]:
    """All head scores in a folder and its subfolders, by their path in it; tables of evaluations, comparisons
    and caches, and probes' controls, are none.

    Raises:
        HeadscopeError: a file among them that was changed, or has lost its table.
    """
    tables = [p for p in folder.rglob("*.parquet") if p.name not in ("evaluation.parquet", "cache.parquet")]
    alone = [p for p in folder.rglob("*.json") if not p.with_suffix(".parquet").exists() and _names_heads(p)]
    return {
        str(path.relative_to(folder).with_suffix(".parquet")): HeadScores.load(path.with_suffix(".json"))
        for path in sorted([*tables, *alone])
        if not path.name.startswith(COMPARED) and path.relative_to(folder).parent.name != "control"
    }


def _names_heads(path: Path) -> bool:
    return b'"heads_per_layer"' in path.read_bytes()


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities (null instead) and without numpy's scalars."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
