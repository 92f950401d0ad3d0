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
    from headscope.interp.explorer import Explorer as Explorer
    from headscope.interp.explorer import explore as explore
    from headscope.interp.explorer import record_run as record_run
    from headscope.interp.models import load_model as load_model
    from headscope.interp.prompts.vision import vision_prompt as vision_prompt
    from headscope.interp.records.record import append_record as append_record
    from headscope.interp.records.record import each_part as each_part
    from headscope.interp.records.record import load_record as load_record
    from headscope.interp.records.record import open_record as open_record
    from headscope.interp.records.record import save_record as save_record
    from headscope.interp.results.headset import HeadSet as HeadSet
    from headscope.interp.results.scores import HeadScores as HeadScores
    from headscope.interp.sites.context_parallel import context_parallel as context_parallel
    from headscope.interp.survey.tiny import tiny_model as tiny_model
    from headscope.interp.sweeps import sweep as sweep
    from headscope.interp.tracing.generation import response_steps as response_steps
    from headscope.interp.tracing.recording import trace as trace
    from headscope.interp.tracing.reference_run import keep_attention as keep_attention
    from headscope.interp.tracing.tracer import Tracer as Tracer

_HOME = {
    "Explorer": "explorer",
    "HeadScores": "results.scores",
    "HeadSet": "results.headset",
    "HeadscopeError": "errors",
    "Tracer": "tracing.tracer",
    "append_record": "records.record",
    "context_parallel": "sites.context_parallel",
    "each_part": "records.record",
    "explore": "explorer",
    "keep_attention": "tracing.reference_run",
    "load_model": "models",
    "load_record": "records.record",
    "open_record": "records.record",
    "record_run": "explorer",
    "response_steps": "tracing.generation",
    "save_record": "records.record",
    "sweep": "sweeps",
    "tiny_model": "survey.tiny",
    "trace": "tracing.recording",
    "vision_prompt": "prompts.vision",
}
_MODULES = ("heads", "models", "plots", "prompts", "statistics")

__all__ = [*_HOME, "heads", "plots"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *_MODULES])
