"""Which tower of a model an attention module belongs to, from its place in the model; names for ``trace(site=...)``.

A site is a pattern of module names such as ``"model.layers.*.self_attn"``. Its tower is one of ``TOWERS``; every alias
selects all sites of that tower, and a pattern selects itself.
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


def tower(site: str, model: nn.Module) -> str:
    """The tower of a site: one of ``TOWERS``."""
    config: Any = getattr(model, "config", None)
    if _CROSS.search(site):
        return "cross"
    if _CONNECTOR.search(site):
        return "connector"
    if _VISION.search(site):
        return "vision"
    if _AUDIO.search(site):
        return "audio"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder" if re.search(r"(^|[._])encoder\.", site) else "decoder"
    reads = getattr(model, "main_input_name", "input_ids")
    if reads == "pixel_values" and not hasattr(config, "text_config"):
        return "vision"
    if reads in ("input_features", "input_values") and not hasattr(config, "text_config"):
        return "audio"
    return "language"


def default_tower(sites: set[str], model: nn.Module) -> str:
    """The tower recorded where none is named: the one that reads or writes text, if there is one."""
    present = {tower(site, model) for site in sites}
    return next((name for name in ("language", "decoder", *TOWERS) if name in present), "language")


def selects(chosen: str, site: str, model: nn.Module) -> bool:
    """Whether the name given as ``site=`` (an alias or a pattern) means this site."""
    if chosen in TOWERS:
        at = tower(site, model)
        return at == chosen or (chosen == "language" and at == "decoder") or (chosen == "audio" and _hears(at, model))
    return chosen == site


def _hears(at: str, model: nn.Module) -> bool:
    return at == "encoder" and getattr(model, "main_input_name", "") in ("input_features", "input_values")


def check_name(chosen: str | None, sites: set[str]) -> None:
    """Refuse a name that is neither an alias nor one of the model's sites.

    Raises:
        HeadscopeError: the message lists what may be named.
    """
    if chosen is not None and chosen not in TOWERS and chosen not in sites:
        known = ", ".join(sorted(site for site in sites if "attn" in site or "attention" in site)[:8])
        raise HeadscopeError(f"no site {chosen!r}: name a tower ({', '.join(TOWERS)}) or a module pattern ({known})")
