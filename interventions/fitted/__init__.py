"""Edits that are fitted to data. To add a way to fit one: a file here and a line in FITS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interventions.fitted.base import Fit

FITS: Registry[Fit] = Registry(
    "fit",
    "fits",
    "headscope.interventions.fitted",
    {
        "iti": "iti:ITI",
        "lofit": "lofit:LoFiT",
        "duo_attention": "duo_attention:DuoAttention",
    },
)
