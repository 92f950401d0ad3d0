"""Which tower of a model an attention module belongs to, from its place in the model; names for ``trace(tower=...)``.

Modules of one kind are a pattern of names such as ``"model.layers.*.self_attn"``. Its tower is one of ``TOWERS``; a
tower's name selects all patterns of that tower, and a pattern selects itself.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from headscope.interp.errors import HeadscopeError

TOWERS = ("language", "vision", "audio", "encoder", "decoder", "cross", "connector")
_CROSS = re.compile(r"cross_?att|encoder_attn|enc(oder_)?_?dec(oder_)?_?att|x_?attn", re.IGNORECASE)
_CONNECTOR = re.compile(r"perceiver|resampler|q_?former|connector|projector|pooler|adapter|mapper", re.IGNORECASE)
_VISION = re.compile(r"vision|visual|image_(tower|encoder|model)|pixel|(^|\.)vit|vpm|sam_|vqmodel", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech|sound", re.IGNORECASE)


def tower_of(module: str, model: nn.Module) -> str:
    """The tower of a pattern of modules: one of ``TOWERS``."""
    config: Any = getattr(model, "config", None)
    if _CROSS.search(module):
        return "cross"
    if _CONNECTOR.search(module):
        return "connector"
    if _VISION.search(module):
        return "vision"
    if _AUDIO.search(module):
        return "audio"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder" if re.search(r"(^|[._])encoder\.", module) else "decoder"
    reads = getattr(model, "main_input_name", "input_ids")
    if reads == "pixel_values" and not hasattr(config, "text_config"):
        return "vision"
    if reads in ("input_features", "input_values") and not hasattr(config, "text_config"):
        return "audio"
    return "language"


def default_tower(modules: set[str], model: nn.Module) -> str:
    """The tower recorded where none is named: the one that reads or writes text, if there is one."""
    present = {tower_of(module, model) for module in modules}
    return next((name for name in ("language", "decoder", *TOWERS) if name in present), "language")


def selects(chosen: str, module: str, model: nn.Module) -> bool:
    """Whether the name given as ``tower=`` (a tower's or a pattern) means these modules."""
    if chosen in TOWERS:
        at = tower_of(module, model)
        return at == chosen or (chosen == "language" and at == "decoder") or (chosen == "audio" and _hears(at, model))
    return chosen == module


def _hears(at: str, model: nn.Module) -> bool:
    return at == "encoder" and getattr(model, "main_input_name", "") in ("input_features", "input_values")


def check_name(chosen: str | None, modules: set[str]) -> None:
    """Refuse a name that is neither an alias nor one of the model's patterns.

    Raises:
        HeadscopeError: the message lists what may be named.
    """
    if chosen is not None and chosen not in TOWERS and chosen not in modules:
        known = ", ".join(sorted(module for module in modules if "attn" in module or "attention" in module)[:8])
        raise HeadscopeError(f"no tower {chosen!r}: name one of ({', '.join(TOWERS)}) or a module pattern ({known})")
