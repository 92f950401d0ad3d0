"""Models: load them, describe them, run them, find their output projections.

Names are imported on first use, so that listing models does not wait for PyTorch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interp.models.available import AvailableModel, available_models
    from headscope.interp.models.info import ModelInfo
    from headscope.interp.models.language_model import LanguageModel
    from headscope.interp.models.load import load_model
    from headscope.interp.models.projections import output_projections

_HOME = {
    "AvailableModel": "available",
    "LanguageModel": "language_model",
    "ModelInfo": "info",
    "available_models": "available",
    "load_model": "load",
    "output_projections": "projections",
}

__all__ = [
    "AvailableModel",
    "LanguageModel",
    "ModelInfo",
    "available_models",
    "load_model",
    "output_projections",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
