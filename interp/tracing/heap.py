"""Giving freed memory back: glibc keeps freed blocks that stand below live ones, and statistics outlive activations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

MANY = 1024  # tokens of a pass, of all its examples, from which it frees enough for a trim to matter
EVERY = 2  # calls between trims: what is given back costs time when it is taken again


class Heap:
    """Gives free pages back after every few large CPU calls (measured at 4,096 tokens: hundreds of MiB of holes)."""

    def __init__(self) -> None:
        self._calls = 0

    def called(self, tokens: int, device: torch.device) -> None:
        """A layer has attended to ``tokens`` tokens of all examples."""
        if tokens < MANY or device.type != "cpu" or _trim() is None:
            return
        self._calls += 1
        if self._calls % EVERY == 0:
            _trim()(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
