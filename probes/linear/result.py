"""What probing found: accuracies beside their controls, and the directions to move heads along."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.sealed import read_beside, unsealed


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions in the space of z for every head, float32, from all examples (training and validation).

    An offset of strength alpha adds ``alpha * sigma * direction`` to a head's z (ITI, arXiv 2306.03341, section 3.3).
    d is d_head, or positions * d_head where several positions were probed together.

    Attributes:
        mass_mean: (layer, head, d) mean(z | label 1) - mean(z | label 0), of length 1 (zero where the means agree).
        mass_mean_norm: (layer, head) the length it had, in units of z.
        mass_mean_sigma: (layer, head) standard deviation (n - 1) of z . mass_mean over the examples, in units of z.
        probe_weight: (layer, head, d) the logistic regression's weights for unscaled z, not normalised.
        probe_bias: (layer, head) its intercept: label 1 where probe_weight . z + probe_bias > 0.
        probe_sigma: (layer, head) standard deviation of z along probe_weight / |probe_weight|, in units of z.
    """

    mass_mean: NDArray[np.float32]
    mass_mean_norm: NDArray[np.float32]
    mass_mean_sigma: NDArray[np.float32]
    probe_weight: NDArray[np.float32]
    probe_bias: NDArray[np.float32]
    probe_sigma: NDArray[np.float32]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically; the tensors are named as the attributes."""
        write_atomically(path, self.as_bytes())
        return Path(path)

    def as_bytes(self) -> bytes:
        """What ``save`` writes."""
        tensors = {name: np.ascontiguousarray(array) for name, array in asdict(self).items()}
        data: bytes = save(tensors, metadata={"format": "headscope directions 1"})
        return data

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """Read what ``save`` wrote; HeadscopeError where it is missing or something else."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise HeadscopeError(
                f"{path} does not hold directions of headscope ({error}); probe the model again"
            ) from error


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Per-head probe accuracies on held-out groups, with what they must be compared to.

    ``scores`` and ``control`` are HeadScores: a trial is one held-out example of one split, 1 where the head's probe is
    right and 0 where it is wrong, so a score is validation accuracy; its bootstrap interval resamples whole groups
    (questions), with the probes as fitted. ``control`` had its labels shuffled before training. ``scores.provenance``
    keeps ``baselines``, the accuracy of the words and the characters alone on each split.

    The highest of many accuracies is high by luck: compare it with ``best_by_chance``, not with 0.5, and do not quote
    its interval as if that head had been chosen beforehand.
    """

    scores: HeadScores
    control: HeadScores
    directions: Directions

    @property
    def dataset(self) -> str:
        """Name of the labelled set."""
        return self.scores.method.removeprefix("probe_")

    @cached_property
    def accuracy(self) -> NDArray[np.float64]:
        """Validation accuracy (seed, layer, head) of each split: ITI's head score."""
        return _by_seed(self.scores)

    @cached_property
    def control_accuracy(self) -> NDArray[np.float64]:
        """The same with shuffled labels (seed, layer, head)."""
        return _by_seed(self.control)

    @property
    def baselines(self) -> dict[str, NDArray[np.float64]]:
        """Accuracy (seed,) of the text's words and characters alone on the same splits."""
        return {name: np.asarray(values) for name, values in self.scores.provenance["baselines"].items()}

    @property
    def best_by_chance(self) -> float:
        """What the best of all heads reaches with shuffled labels: the maximum over heads, averaged over the splits.

        It stands for a single split, so it is strict for a score that averages several.
        """
        return float(self.control_accuracy.max(axis=(1, 2)).mean())

    def above_chance(self) -> HeadSet:
        """Heads whose accuracy is above ``best_by_chance``, best first."""
        return self.scores.above(self.best_by_chance)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, best head first: layer, head, accuracy, ci_low, ci_high, control, n, above_chance."""
        frame = self.scores.to_frame().rename(columns={"score": "accuracy"})
        at = (frame["layer"].to_numpy(), frame["head"].to_numpy())
        frame.insert(5, "control", self.control.mean[at])
        return frame.assign(above_chance=frame["accuracy"] > self.best_by_chance)

    def summary(self) -> dict[str, Any]:
        """The numbers to report together: best head, its interval, control, chance of the best, surface baselines."""
        best = self.to_frame().iloc[0]
        low, high = float(best["ci_low"]), float(best["ci_high"])
        return {
            "dataset": self.dataset,
            "best_head": [int(best["layer"]), int(best["head"])],
            "accuracy": float(best["accuracy"]),
            "interval": [low, high],
            "n": int(best["n"]),
            "control_mean": float(self.control.mean.mean()),
            "best_by_chance": self.best_by_chance,
            "heads_above_chance": len(self.above_chance()),
            "heads": int(self.scores.mean.size),
            "baselines": {name: float(values.mean()) for name, values in self.baselines.items()},
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``probe_NAME.json`` and ``.parquet``, ``probe_NAME.safetensors`` and ``control/``; returns the JSON.

        Each file is written atomically, the JSON last, with the checksums of the others: ``load`` refuses files of
        different runs.
        """
        folder, method = Path(folder), self.scores.method
        control = self.control.save(folder / "control")
        beside = {f"control/{control.name}": control.read_bytes(), f"{method}.safetensors": self.directions.as_bytes()}
        return self.scores.save(folder, beside)

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read what ``save`` wrote, from its folder or its JSON file.

        Raises:
            HeadscopeError: no such file, or files that are not one probe result.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        scores = HeadScores.load(path)
        if "baselines" not in scores.provenance:
            raise HeadscopeError(f"{path} holds scores of {scores.method!r}, not a probe result")
        parts = (f"control/{scores.method}_control.json", f"{scores.method}.safetensors")
        control, directions = HeadScores.load(folder / parts[0]), Directions.load(folder / parts[1])
        try:
            main = folder / f"{scores.method}.json"
            for name in parts:
                read_beside(main, unsealed(json.loads(main.read_bytes())), name)
        except (OSError, ValueError, KeyError) as error:
            raise HeadscopeError(
                f"the files of {scores.method} in {folder} belong to different runs ({error}); probe again"
            ) from error
        return cls(scores, control, directions)


def _by_seed(scores: HeadScores) -> NDArray[np.float64]:
    seed = np.array([row["seed"] for row in scores.details])
    order = list(dict.fromkeys(seed.tolist()))
    return np.stack([scores.trials[seed == one].mean(axis=0) for one in order])
