"""Attention variants of the bench: one file each, and a line in ``VARIANTS``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interp.laboratory.variants.base import Variant

VARIANTS: Registry[Variant] = Registry(
    "attention variant", "variants", "headscope.interp.laboratory.variants", {"softmax": "softmax:Softmax"}
)

__all__ = ["VARIANTS"]
