"""Texts that every installation has, as bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.haystack import load_haystack

SOURCES = ("prose", "python")
BEGIN = 0  # a byte that no text has


@dataclass(frozen=True, eq=False)
class Text:
    """Byte values (n,) that are trained on, and those that are held out: the last tenth."""

    train: Tensor
    held: Tensor

    @classmethod
    def load(cls, source: str, share: float = 1.0) -> Text:
        """``"prose"``: the bundled novel (464 kB). ``"python"``: the modules of Python's own library, 7 MB and not the
        same in every version. ``share`` of what is trained on is kept, its beginning.

        Raises:
            HeadscopeError: another source.
        """
        if source == "prose":
            raw = load_haystack().encode()
        elif source == "python":
            raw = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        else:
            raise HeadscopeError(f"there is no text {source!r}; choose {', '.join(SOURCES)}")
        text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
        cut = len(text) * 9 // 10
        return cls(text[: int(cut * share)], text[cut:])


def windows(text: Tensor, count: int, length: int, source: torch.Generator, begin: bool) -> Tensor:
    """``count`` pieces of ``length`` bytes (count, length) from anywhere in ``text``, each behind BEGIN in place of its
    first byte if asked."""
    first = torch.randint(len(text) - length + 1, (count, 1), generator=source)
    drawn = text[first + torch.arange(length)]
    if begin:
        drawn[:, 0] = BEGIN
    return drawn
