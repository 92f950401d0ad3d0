"""What policies for a cache lose: per policy, budget, prompt, layer and head, with intervals over prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.paired import FEW
from headscope.interp.runs.sealed import read_beside, unsealed, write_results

FORMAT = 2
NAME = "cache"  # of the files
MEASURES: Mapping[str, str] = {  # and their units
    "recall": "share of the true mass",
    "error": "|z - z'| / |z|",
    "divergence": "nats",
    "kept": "keys",
    "needed": "keys",
}
AXES = ("policy", "budget", "prompt", "layer", "head")  # of every measure, and of the table's rows


def plain(values: NDArray[np.float64]) -> list[Any]:
    """An array as nested lists for JSON, None where it is no number."""
    held = values.astype(object)
    held[~np.isfinite(values)] = None
    return list(held.tolist())


@dataclass(frozen=True, eq=False, repr=False)
class CacheLosses:
    """The exact loss of ``policies`` at ``budgets``.

    ``values`` holds for each of ``MEASURES`` an array (policy, budget, prompt, layer, head), means over the measured
    rows of a prompt; NaN in layers without softmax attention, and of ``needed`` where a policy keeps no fixed keys:

    - ``recall``: the share of a row's mass that lies on kept keys, in [0, 1];
    - ``error``: |z - z'| / |z| of the head's output with and without the policy, before the output projection;
    - ``divergence``: KL(kept || full) of the patterns, which is the mean of -log recall where there are no sink logits;
    - ``kept``: how many keys of the prompt a row sees under the policy. It is the budget where that many are kept and
      in the row's reach; less in a layer with a sliding window, for early rows of a prompt that is measured itself, and
      for a policy that counts a row's own last tokens in its budget; more for one whose settings keep keys beyond it;
    - ``needed``: the fewest kept keys of the prompt that hold 95 % of the mass that the rows put on kept keys of it.

    ``overlap`` (policy, policy, budget, prompt): of the prompt's keys that either of two policies keeps, the share that
    both keep (Jaccard), over layers and heads; NaN for a policy that keeps no fixed keys.

    All of them are of one layer whose inputs are the full model's: what is lost in one layer does not add to the next.
    What a model under the policy gets wrong is the edit's matter (``headscope.interventions``, ``EvictKeys``).

    ``details`` says of each prompt how many tokens it has, and how many of them are the prompt.

    Intervals are percentile bootstraps over prompts, which count as independent; there is none below ``FEW`` (6) of
    them, where none would cover (see ``results.paired.mean_interval``).
    """

    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    overlap: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)
    details: tuple[dict[str, Any], ...] = ()
    level: float = 0.95
    resamples: int = 2000

    def __repr__(self) -> str:
        return f"CacheLosses({', '.join(self.policies)} at {', '.join(self.budgets)} keys, {self.prompts} prompts)"

    @property
    def prompts(self) -> int:
        """How many prompts were measured."""
        return int(self.values["recall"].shape[2])

    @property
    def few(self) -> str:
        """A sentence where they are too few for intervals, else nothing."""
        many = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        return f"{many}: no intervals, which say nothing of fewer than {FEW}." if self.prompts < FEW else ""

    def mean(self, measure: str = "recall") -> NDArray[np.float64]:
        """The mean over prompts: (policy, budget, layer, head)."""
        return np.asarray(self._of(measure).mean(axis=2))

    def per_prompt(self, measure: str = "recall") -> NDArray[np.float64]:
        """The mean over layers and heads: (policy, budget, prompt); NaN where no head has a value."""
        values = self._of(measure).reshape(*self._of(measure).shape[:3], -1)
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.nansum(values, axis=-1) / known.sum(-1))

    def to_frame(self) -> pd.DataFrame:
        """A row for each policy and budget: the mean of every measure over layers and heads, its interval over
        prompts (``ci_low_recall`` and so on; NaN below ``FEW`` prompts), and how many prompts there are."""
        rows: dict[str, Any] = {
            "policy": [p for p in self.policies for _ in self.budgets],
            "budget": list(self.budgets) * len(self.policies),
        }
        for measure in MEASURES:
            values = self.per_prompt(measure)
            low, high = self._interval(np.moveaxis(values, 2, 0))
            rows |= {measure: values.mean(-1).ravel(), f"ci_low_{measure}": low.ravel()}
            rows |= {f"ci_high_{measure}": high.ravel()}
        return pd.DataFrame({**rows, "prompts": self.prompts})

    def heads_frame(self, measure: str = "recall") -> pd.DataFrame:
        """A row for each policy, budget, layer and head: the mean of a measure, its interval over prompts (NaN below
        ``FEW``), and n."""
        mean = self.mean(measure)
        low, high = self._interval(np.moveaxis(self._of(measure), 2, 0))
        policy, budget, layer, head = (x.ravel() for x in np.indices(mean.shape))
        columns: dict[str, Any] = {
            "policy": np.array(self.policies)[policy],
            "budget": np.array(self.budgets)[budget],
            "layer": layer,
            "head": head,
            measure: mean.ravel(),
            "ci_low": low.ravel(),
            "ci_high": high.ravel(),
        }
        return pd.DataFrame({**columns, "n": self.prompts})

    def _interval(self, trials: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if len(trials) < FEW:
            none = np.full(trials.shape[1:], np.nan)
            return none, none.copy()
        return bootstrap_mean(trials, level=self.level, resamples=self.resamples)

    def _of(self, measure: str) -> NDArray[np.float64]:
        if measure not in MEASURES:
            raise HeadscopeError(f"there is no measure {measure!r}; choose {', '.join(MEASURES)}")
        return self.values[measure]

    def save(self, folder: str | Path) -> Path:
        """Write ``cache.json`` (means, intervals, provenance) and ``cache.parquet`` (every value); the JSON's path.

        Raises:
            HeadscopeError: the disk is full, or the folder cannot be written.
        """
        path = Path(folder) / f"{NAME}.json"
        shape = self._of("recall").shape
        document = {
            "format": FORMAT,
            "policies": list(self.policies),
            "budgets": list(self.budgets),
            "shape": list(shape),
            "level": self.level,
            "resamples": self.resamples,
            "summary": json.loads(self.to_frame().to_json(orient="records")),
            "overlap": plain(self.overlap),
            "provenance": self.provenance,
            "prompts": list(self.details),
        }
        index = {axis: at.ravel() for axis, at in zip(AXES, np.indices(shape), strict=True)}
        table = pd.DataFrame(index | {name: self.values[name].ravel() for name in MEASURES})
        write_results(path, document, {f"{NAME}.parquet": table.to_parquet(index=False)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> CacheLosses:
        """Read what ``save`` wrote, from the JSON file or its folder.

        Raises:
            HeadscopeError: no such file, another file, or one that was changed.
        """
        path = Path(path) / f"{NAME}.json" if Path(path).is_dir() else Path(path)
        try:
            document = unsealed(json.loads(path.read_bytes()))
            table = pd.read_parquet(io.BytesIO(read_beside(path, document, f"{NAME}.parquet")))
            shape = tuple(int(n) for n in document["shape"])
            values = {name: table[name].to_numpy(np.float64).reshape(shape) for name in MEASURES}
            names = tuple(document["policies"]), tuple(document["budgets"])
            overlap = np.array(document["overlap"], dtype=np.float64)
            made, details = dict(document["provenance"]), tuple(document["prompts"])
            return cls(*names, values, overlap, made, details, float(document["level"]), int(document["resamples"]))
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise HeadscopeError(
                f"{path} holds no losses of cache policies ({error}); run `headscope discover cache --out FOLDER`"
            ) from error
