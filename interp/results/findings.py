"""What an experiment of the laboratory found: numbers of every seed, curves, and which claims held."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.files import write_atomically

Numbers = dict[str, NDArray[np.float64]]  # of every seed, by name


@dataclass(frozen=True)
class Claim:
    """``says``: what is claimed, and by whom. ``paper``: the paper's figure ("" where it prints none). ``ours``: what
    was found. ``held``: whether it did; None where these settings cannot tell."""

    says: str
    paper: str
    ours: str
    held: bool | None


@dataclass(frozen=True, eq=False)
class Findings:
    """``outcomes``: a mapping a seed, of ``numbers`` (name -> number) and ``curves`` (label -> rows with ``step``)."""

    experiment: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    outcomes: list[dict[str, Any]]
    claims: list[Claim]
    provenance: dict[str, Any]

    @property
    def numbers(self) -> Numbers:
        """Every number, (seed,)."""
        return numbers_of(self.outcomes)

    def summary(self) -> pd.DataFrame:
        """One row a number: its mean, and the smallest and largest of the seeds (three tell no more than that)."""
        rows = [
            {"number": name, "mean": np.mean(each), "low": np.min(each), "high": np.max(each), "seeds": len(each)}
            for name, each in self.numbers.items()
        ]
        return pd.DataFrame(rows, columns=["number", "mean", "low", "high", "seeds"])

    def verdicts(self) -> pd.DataFrame:
        """One row a claim: claim, paper, ours, held ("yes", "no", "-")."""
        words = {True: "yes", False: "no", None: "-"}
        rows = [{"claim": c.says, "paper": c.paper, "ours": c.ours, "held": words[c.held]} for c in self.claims]
        return pd.DataFrame(rows, columns=["claim", "paper", "ours", "held"])

    def curve(self, label: str, number: str) -> pd.DataFrame:
        """A number while the model ``label`` learned: columns step, seed, value. What has a value a layer and head is
        averaged over them.

        Raises:
            HeadscopeError: no such label, or number.
        """
        rows: list[dict[str, Any]] = []
        for seed, outcome in zip(self.seeds, self.outcomes, strict=True):
            if label not in outcome["curves"]:
                raise HeadscopeError(f"there is no curve {label!r}; choose {', '.join(outcome['curves'])}")
            for row in outcome["curves"][label]:
                if number not in row:
                    known = ", ".join(key for key in row if key != "step")
                    raise HeadscopeError(f"the curve {label!r} has no number {number!r}; choose {known}")
                value = np.asarray(row[number], dtype=np.float64)
                rows.append({"step": row["step"], "seed": seed, "value": float(np.nanmean(value))})
        return pd.DataFrame(rows, columns=["step", "seed", "value"])

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        held = asdict(self) | {"seeds": list(self.seeds)}
        write_atomically(path, (json.dumps(held, indent=1, default=float) + "\n").encode())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Findings:
        """What ``save`` wrote.

        Raises:
            HeadscopeError: the file holds something else.
        """
        try:
            held = json.loads(Path(path).read_text())
            claims = [Claim(**claim) for claim in held.pop("claims")]
            return cls(**(held | {"seeds": tuple(held["seeds"])}), claims=claims)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(f"{path} holds no findings of the laboratory") from error


def numbers_of(outcomes: Sequence[Mapping[str, Any]]) -> Numbers:
    """The numbers of several seeds, by name: (seed,)."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome["numbers"])
    return {name: np.array([one["numbers"].get(name, np.nan) for one in outcomes], dtype=float) for name in names}
