"""Giving freed memory back: glibc keeps freed blocks that stand below live ones, and statistics outlive activations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

MANY = 1024  # tokens of a pass, of all its examples, from which it frees enough for a trim to matter


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None


def give_back(tokens: int) -> None:
    """Return free pages to the system after a large CPU pass (measured at 4,096 tokens: hundreds of MiB of holes)."""
    trim = _trim()
    if trim is not None and tokens >= MANY:
        trim(0)
