"""Giving freed memory back: glibc keeps freed blocks that stand below live ones, and statistics outlive activations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

LONG = 1 << 20  # queries x keys from which a pass frees enough for a trim to matter


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None


def give_back(queries: int, keys: int) -> None:
    """Return free pages to the system after a long CPU pass (measured at 4,096 tokens: hundreds of MiB of holes)."""
    trim = _trim()
    if trim is not None and queries * keys >= LONG:
        trim(0)
