"""Where a prompt ends: what an edit that acts while reading or while writing goes by.

Whoever builds a prompt says so (``with prompt_boundary(len(ids))``: the tasks do); ``generate`` says it by itself
inside ``apply``. A query row is of the prompt or of a generated token by its position, however the passes are cut:
whole, in chunks, or all over again at every step (without a cache).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True)
class Boundary:
    """``lengths``: tokens of the prompt, one number for all examples or one an example; ``padded``: counted from the
    first column of the batch, left padding included (otherwise from each example's first token)."""

    lengths: tuple[int, ...]
    padded: bool = False


_BOUNDARY: ContextVar[Boundary | None] = ContextVar("headscope_prompt_boundary", default=None)


def known_boundary() -> Boundary | None:
    """What the innermost block says, or None."""
    return _BOUNDARY.get()


@contextmanager
def prompt_boundary(length: int | Sequence[int], *, padded: bool = False) -> Iterator[None]:
    """Inside the block prompts have ``length`` tokens (one number, or one an example); what follows is generated.

    Args:
        padded: ``length`` counts left padding too, as the width of a padded batch does.

    Raises:
        HeadscopeError: a length below 1.
    """
    lengths = (length,) if isinstance(length, int) else tuple(int(n) for n in length)
    if not lengths or min(lengths) < 1:
        raise HeadscopeError(f"a prompt has at least one token, so its boundary is at least 1; got {length}")
    token = _BOUNDARY.set(Boundary(lengths, padded))
    try:
        yield
    finally:
        _BOUNDARY.reset(token)
