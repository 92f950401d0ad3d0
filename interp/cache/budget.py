"""How many keys a policy keeps."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True)
class Budget:
    """``keys`` that are kept of each prompt and head, or a ``share`` of its tokens, rounded down (at least one key).

    A share is read as the decimal that it is written as, so that 0.29 of 100 tokens are 29 (in floating point, 28).
    """

    keys: int | None = None
    share: float | None = None

    @classmethod
    def of(cls, given: Any) -> Budget:
        """A budget from ``256``, ``0.25``, or their text.

        Raises:
            HeadscopeError: neither a whole number of keys from 1 on, nor a share between 0 and 1.
        """
        if isinstance(given, Budget):
            return given
        try:
            number = float(given)
        except (TypeError, ValueError):
            number = float("nan")
        if 0 < number < 1:
            return cls(share=number)
        if number == 1 and (isinstance(given, float) or "." in str(given)):
            raise HeadscopeError(f"a budget of {given} is one key or all of them: say 1, or a share below 1")
        if number >= 1 and number.is_integer() and not isinstance(given, bool):
            return cls(keys=int(number))
        raise HeadscopeError(f"a budget is a number of keys (256) or a share of the tokens (0.25), not {given!r}")

    def count(self, tokens: Tensor) -> Tensor:
        """How many keys are kept of so many ``tokens``: integers of the same shape."""
        if self.keys is not None:
            return torch.full_like(tokens, self.keys)
        share = Fraction(str(self.share))
        kept = [max(1, int(share * int(n))) for n in tokens.flatten().tolist()]
        return tokens.new_tensor(kept).view_as(tokens)

    def __str__(self) -> str:
        return str(self.keys) if self.keys is not None else str(self.share)
