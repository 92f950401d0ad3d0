"""What every fit is: a declaration that makes an edit of a model and data. What comes of it, and how many heads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_numbers
from headscope.interp.runs.files import write_atomically
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import tower_size
from headscope.interventions.applying import size
from headscope.interventions.base import Intervention

Data = str | Path | Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Base of the ways to fit an edit. A subclass says what ``data`` are, and fits.

    Args:
        seed: of everything that is drawn.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    source: ClassVar[str] = ""

    seed: int = 42

    def __post_init__(self) -> None:
        check_numbers(self, self.name)

    def fit(self, model: ModelLike, data: Data, *, progress: bool = True) -> Fitted:
        """The edit that the data ask for, and what was found on the way; the model is left bitwise as it was."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """An edit that was fitted, and where it came from.

    Attributes:
        edit: an ordinary edit, for ``apply``, ``evaluate``, ``export`` and ``save``.
        provenance: model, data, settings, versions.
    """

    edit: Intervention
    provenance: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """What was found, in a few numbers."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Everything that is worth keeping beside the edit, JSON-able."""
        return {"summary": self.summary(), "edit": self.edit.describe(), "provenance": self.provenance}

    def save(self, path: str | Path, model: ModelLike) -> Path:
        """Write the edit as ``path``, for this model (``load_intervention`` reads it), and the record beside it, as
        ``PATH.json``; returns ``path``.

        Raises:
            HeadscopeError: one of the two is there already.
        """
        path = new_file(path)
        document = json.dumps(plain(self.record()), indent=1, default=str, allow_nan=False)
        write_atomically(beside(path), (document + "\n").encode())
        return self.edit.save(path, model)


def new_file(path: str | Path) -> Path:
    """A path that ``Fitted.save`` may write.

    Raises:
        HeadscopeError: something is there already.
    """
    path = Path(path)
    for one in (path, beside(path)):
        if one.exists():
            raise HeadscopeError(f"{one} is there already, and is not overwritten: name another file, or remove it")
    return path


def beside(path: Path) -> Path:
    """Where the record of the fit of ``path`` stands."""
    return path.with_name(path.name + ".json")


def plain(value: Any) -> Any:
    """A document in which numbers that JSON lacks are null."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def every_head(lm: LanguageModel) -> list[tuple[int, int]]:
    """The (layer, head) pairs of all layers that attend, in the model's order."""
    known, (layers, most) = tower_size(lm).heads, size(lm)
    return [(layer, head) for layer in known or range(layers) for head in range(known.get(layer) or most)]


def how_many(who: str, top: int, share: float | None, heads: int) -> int:
    """``top``, or ``share`` of ``heads`` cut to a whole number (in exact decimals: 0.29 of 100 is 29).

    Raises:
        HeadscopeError: none, or more than there are.
    """
    count = top if share is None else int(Fraction(str(share)) * heads)
    if not 0 < count <= heads:
        what = f"top={top}" if share is None else f"share={share:g}"
        raise HeadscopeError(
            f"{who}: {what} is {count} of {heads} heads; choose 1 to {heads}, or a share such as share=0.05"
        )
    return count
