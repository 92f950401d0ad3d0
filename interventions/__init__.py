"""Change heads and re-evaluate. Names are imported on first use, so that importing the room does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interventions.ablate import AblateHeads as AblateHeads
    from headscope.interventions.ablate import head_means as head_means
    from headscope.interventions.base import Intervention as Intervention
    from headscope.interventions.base import apply as apply
    from headscope.interventions.comparison import Evaluation as Evaluation
    from headscope.interventions.evaluation import evaluate as evaluate
    from headscope.interventions.tasks import TextLoss as TextLoss

_HOME = {
    "AblateHeads": "ablate",
    "Evaluation": "comparison",
    "Intervention": "base",
    "TextLoss": "tasks",
    "apply": "base",
    "evaluate": "evaluation",
    "head_means": "ablate",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module = import_module(f"{__name__}.{_HOME[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
