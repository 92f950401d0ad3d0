"""What a run will take, before it runs: forward passes, tokens, time and memory.

``with dry_run() as planned:`` around a discovery or an evaluation stops it where its work would begin and leaves the
work in ``planned``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.unwrap import bare_model, model_device

_DRY: ContextVar[bool] = ContextVar("headscope_dry_run", default=False)
CALIBRATION = 256  # tokens of the forward pass that is timed


@dataclass
class Work:
    """``passes``: one (prompt tokens, generated tokens) a prompt; ``files``: what is written, by name.

    Where prompts run together, ``batches`` says how often, and ``memory`` the bytes of the largest batch above the
    model's own.
    """

    passes: list[tuple[int, int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    batches: int | None = None
    memory: int | None = None


class Planned(Exception):
    """Raised where the work would begin, in a dry run."""

    def __init__(self, work: Work) -> None:
        super().__init__("dry run")
        self.work = work


@contextmanager
def dry_run() -> Iterator[Work]:
    """Collect the work that a discovery or an evaluation inside would do, without doing it."""
    planned = Work()
    token = _DRY.set(True)
    try:
        yield planned
    except Planned as stop:
        vars(planned).update(vars(stop.work))
    finally:
        _DRY.reset(token)


def announce(passes: Iterable[tuple[int, int]], files: list[str], **batched: int) -> None:
    """Called where work begins: in a dry run, stop here and say what it would be."""
    if _DRY.get():
        raise Planned(Work(list(passes), files, **batched))


def estimate(lm: LanguageModel, work: Work) -> dict[str, Any]:
    """Forward passes, tokens, about how many seconds (timed on this machine: one short prompt, two decoding steps) and
    about how many MiB of memory at the longest prompt."""
    prefill, step = _calibrate(lm)
    info = lm.info
    parameters = max(1, info.parameters - info.vocab_size * info.d_model)
    seconds = 0.0
    for tokens, new in work.passes:
        attention = info.layers * info.heads * info.d_head * tokens / parameters  # against the linear part
        seconds += prefill * tokens * (1.0 + attention) + step * new
    longest = max((tokens + new for tokens, new in work.passes), default=0)
    bytes_each = next(bare_model(lm).parameters()).element_size()
    cache = 2 * info.layers * info.kv_heads * info.d_head * longest * bytes_each
    activations = 8 * longest * info.d_model * bytes_each
    above = cache + activations if work.memory is None else work.memory
    prompts = len(work.passes) if work.batches is None else work.batches
    return {
        "forward_passes": prompts + sum(new for _, new in work.passes),
        "prompts": len(work.passes),
        "tokens": sum(tokens + new for tokens, new in work.passes),
        "seconds": round(seconds, 1),
        "memory_mib": round((info.parameters * bytes_each + above) / 2**20),
        "files": work.files,
    }


def _calibrate(lm: LanguageModel) -> tuple[float, float]:
    """Seconds a prompt token and seconds a decoding step."""
    model, info = bare_model(lm), lm.info
    length = min(CALIBRATION, (info.context_length or CALIBRATION) - 4)
    ids = torch.randint(0, info.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model_device(model))
    with torch.no_grad():
        model(input_ids=ids)
        begin_prompt = time.perf_counter()
        cache = model(input_ids=ids, use_cache=True).past_key_values
        begin_steps = time.perf_counter()
        for _ in range(2):
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        end = time.perf_counter()
    return (begin_steps - begin_prompt) / length, (end - begin_steps) / 2
