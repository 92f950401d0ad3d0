"""Trace a model, find its heads, look at them.

Names are imported on first use (PEP 562), so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interp import heads as heads
    from headscope.interp import plots as plots
    from headscope.interp.errors import HeadscopeError as HeadscopeError
    from headscope.interp.headset import HeadSet as HeadSet
    from headscope.interp.kept import keep_attention as keep_attention
    from headscope.interp.models import load_model as load_model
    from headscope.interp.record import append_record as append_record
    from headscope.interp.record import each_part as each_part
    from headscope.interp.record import load_record as load_record
    from headscope.interp.record import open_record as open_record
    from headscope.interp.record import save_record as save_record
    from headscope.interp.scores import HeadScores as HeadScores
    from headscope.interp.sweeps import sweep as sweep
    from headscope.interp.tracer import Tracer as Tracer
    from headscope.interp.tracer import trace as trace
    from headscope.interp.tracing.generation import response_steps as response_steps
    from headscope.interp.vision import vision_prompt as vision_prompt

_HOME = {
    "HeadScores": "scores",
    "HeadSet": "headset",
    "HeadscopeError": "errors",
    "Tracer": "tracer",
    "append_record": "record",
    "each_part": "record",
    "keep_attention": "kept",
    "load_model": "models",
    "load_record": "record",
    "open_record": "record",
    "response_steps": "tracing.generation",
    "save_record": "record",
    "sweep": "sweeps",
    "trace": "tracer",
    "vision_prompt": "vision",
}
_MODULES = ("heads", "plots", "statistics", "spans", "queries", "models", "report")

__all__ = [*_HOME, "heads", "plots"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_MODULES])
