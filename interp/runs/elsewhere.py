"""A model in another process: loaded there by its name, or sent as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.load import load_model
from headscope.interp.runs.provenance import fingerprint
from headscope.interp.sites import handlers_on


def maker(given: Any, lm: LanguageModel) -> Callable[[], LanguageModel]:
    """What makes ``lm`` in another process; ``given`` is what ``load_model`` made it of.

    Raises:
        HeadscopeError: an edit is in force, which would stay behind.
    """
    if handlers_on(lm):
        raise HeadscopeError(
            "an edit or a trace is in force, on this process's model alone: leave its block for engine="
        )
    dtype = getattr(torch, lm.info.dtype)
    if isinstance(given, str | Path):
        return partial(_loaded, str(given), dtype, fingerprint(lm.inner))
    return partial(_sent, lm)


def _loaded(name: str, dtype: torch.dtype, expected: str) -> LanguageModel:
    lm = load_model(name, dtype=dtype)
    if fingerprint(lm.inner) != expected:
        raise HeadscopeError(f"{name} has other weights on another host; give all of them the same files or revision")
    return lm


def _sent(lm: LanguageModel) -> LanguageModel:
    if torch.cuda.is_available() and lm.device.type == "cpu" and not getattr(lm.inner, "hf_device_map", None):
        lm.inner.to("cuda")
    return lm
