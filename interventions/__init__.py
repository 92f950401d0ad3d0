"""Change heads and re-evaluate. Names are imported on first use, so that importing the room does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interp.results.evaluation import Evaluation as Evaluation
    from headscope.interventions.base import Intervention as Intervention
    from headscope.interventions.base import apply as apply
    from headscope.interventions.evaluation.evaluate import evaluate as evaluate
    from headscope.interventions.outputs.ablate import AblateHeads as AblateHeads
    from headscope.interventions.outputs.ablate import head_means as head_means
    from headscope.interventions.tasks.text_loss import TextLoss as TextLoss

_HOME = {
    "AblateHeads": "outputs.ablate",
    "Evaluation": "evaluation",
    "Intervention": "base",
    "TextLoss": "tasks.text_loss",
    "apply": "base",
    "evaluate": "evaluation.evaluate",
    "head_means": "outputs.ablate",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module = import_module(f"{__name__}.{_HOME[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
