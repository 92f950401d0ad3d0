"""Reading saved interventions: nothing in a file is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import make
from headscope.interp.sites.given import ModelLike
from headscope.interventions import files
from headscope.interventions.base import Composed, Intervention, parts_of
from headscope.interventions.decoding import DECODINGS
from headscope.interventions.edits import EDITS


def load_intervention(path: str | Path, model: ModelLike | None = None, *, any_model: bool = False) -> Intervention:
    """An intervention from the file that its ``save`` wrote.

    Args:
        model: check now that the file is for this model (``apply`` checks it anyway, where the file names a model).
        any_model: for use on another model than the one it was saved for; heads and shapes are still checked.

    Raises:
        HeadscopeError: no such file, no saved intervention, one that was changed or cut short, an edit or a setting
            that this installation does not know, or another model's.
    """
    document, tensors = files.read(path)
    try:
        found = _made(document, tensors)
        made_for = document["model"]
        if made_for is not None and not isinstance(made_for, dict):
            raise TypeError("model is no dict")
    except HeadscopeError as error:
        raise HeadscopeError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise files.not_saved(path, error) from error
    if made_for is not None and not any_model:
        for part in parts_of(found):
            object.__setattr__(part, "made_for", made_for)
        if model is not None:
            files.require_model(made_for, model, found.name)
    return found


def _made(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if "parts" in document:
        return Composed([_made(part, tensors) for part in document["parts"]])
    kind = str(document["kind"])
    given = {name: files.decode(value, tensors) for name, value in dict(document["settings"]).items()}
    return make(named(kind), kind, given)


def named(kind: str) -> type[Intervention]:
    """The edit, or the way of choosing tokens, of this name.

    Raises:
        HeadscopeError: none is called so.
    """
    return DECODINGS[kind] if kind in DECODINGS else EDITS[kind]
