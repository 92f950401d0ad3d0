"""What a policy is: a frozen declaration that says which keys are kept at a budget.

``KeyPolicy``: one score a key; the best of the prompt stay, and every later key. ``RowPolicy``: a rule for each query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.blocks import heaviest
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_numbers
from headscope.kernels.kept import Keep

COUNTED = ("active", "block", "chunk", "dilation", "kernel", "segment", "stride", "tokens", "window")  # 1 at least
ONE_SEQUENCE: Mapping[str, str] = {
    "cross-attention": "no prompt ends there",
    "packed sequences": "keys are kept of one sequence an example",
    "chunked prefill": "keys are chosen over the whole prompt",
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of the policies.

    Class variables: ``name``, as in the registry; ``unit``, of the score; ``source``; ``refused``, where it is not
    exact and why; ``needs``, what of a ``Reading`` it cannot do without: ``"rotation"``, ``"ahead"``, ``"measured"``,
    ``"carried"`` (it goes by what it decided in the layers below, so that all of them are measured).
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    source: ClassVar[str] = ""
    refused: ClassVar[Mapping[str, str]] = ONE_SEQUENCE
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_numbers(self, self.name)
        for one in fields(self):
            value = getattr(self, one.name)
            if str(one.type) == "bool" and not isinstance(value, bool):
                raise HeadscopeError(f"{self.name}: {one.name} is true or false, not {value!r:.60}")
            if isinstance(value, int) and value < (low := int(one.name in COUNTED and one.default != 0)):
                raise HeadscopeError(f"{self.name}: {one.name} is {low} or more, not {value}")

    def keeps(self, reading: Reading, budgets: Sequence[Budget]) -> list[Keep]:
        """Which keys the rows of ``reading.call`` see, at each budget.

        Raises:
            HeadscopeError: as ``check``.
        """
        raise NotImplementedError

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        """Refuse prompts of so many ``tokens`` (batch,) of which ``kept`` (batch,) are to stay: what can be told before
        anything is read.

        Raises:
            HeadscopeError: a prompt too short, or a budget too small, for the settings.
        """

    def idle(self, tokens: Tensor, kept: Tensor) -> str:
        """Why nothing is left to choose in any of such prompts, where that is so; else nothing."""
        return ""

    def appended(self, ids: Sequence[int]) -> list[int]:
        """Tokens to be read after the prompt ``ids``, whose queries it asks for (``ahead``)."""
        return []


@dataclass(frozen=True, kw_only=True)
class KeyPolicy(Policy):
    """Base of the policies that score the prompt's keys once. A subclass writes ``scores``.

    Args:
        sink: so many first tokens are always kept; they count in the budget.
        recent: so many last tokens of the prompt are always kept; they count in the budget.
    """

    sink: int = 0
    recent: int = 0

    def scores(self, reading: Reading) -> Tensor:
        """One score a key, high for those to keep: (batch, kv_head or head or 1, key). Only the prompt's keys count."""
        raise NotImplementedError

    def always(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """How many first and how many last tokens stay whatever their score, of ``kept`` (batch,) that do."""
        return torch.full_like(kept, self.sink), torch.full_like(kept, self.recent)

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        kept = torch.minimum(kept, tokens)
        fixed = self._fixed(tokens, kept)
        if bool(((fixed > kept) & (kept < tokens)).any()):
            raise HeadscopeError(
                f"{self.name} always keeps {int(fixed.max())} keys, more than its budget of {int(kept.min())}: give it "
                "a larger budget, or smaller settings (sink, recent, window)"
            )

    def idle(self, tokens: Tensor, kept: Tensor) -> str:
        fixed = self._fixed(tokens, kept)
        if bool(((fixed < kept) | (kept >= tokens)).any()):
            return ""
        return f"it always keeps {int(fixed.max())} first or last tokens, so that its scores choose no key"

    def _fixed(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """How many keys stay whatever their score."""
        sink, recent = (torch.minimum(x, tokens) for x in self.always(kept))
        return sink + recent

    def sets(self, reading: Reading, budgets: Sequence[Budget]) -> list[Tensor]:
        """The prompt's kept keys at each budget: bool (batch, kv_head or head or 1, key).

        Equal scores are kept in the order of the text.

        Raises:
            HeadscopeError: as ``check``.
        """
        for budget in budgets:
            self.check(reading.count, budget.count(reading.count))
        score = self.scores(reading).masked_fill(~reading.keys[:, None], -torch.inf)
        return [self._best(reading, score, budget) for budget in budgets]

    def _best(self, reading: Reading, score: Tensor, budget: Budget) -> Tensor:
        kept = torch.minimum(budget.count(reading.count), reading.count)
        sink, recent = (torch.minimum(x, reading.count) for x in self.always(kept))
        fixed = (reading.at < sink[:, None]) | (reading.at >= (reading.count - recent)[:, None])
        score = score.masked_fill((fixed & reading.keys)[:, None], torch.inf)
        return heaviest(score, kept)

    def keeps(self, reading: Reading, budgets: Sequence[Budget]) -> list[Keep]:
        """The kept keys of the prompt, and every later one, for each query head."""
        later = (reading.at >= reading.count[:, None])[:, None]
        return [by_head(reading, kept) | later for kept in self.sets(reading, budgets)]


def by_head(reading: Reading, kept: Tensor) -> Tensor:
    """Sets of key heads (batch, kv_head or head or 1, key) as those of their query heads."""
    heads, held = reading.call.query.shape[1], kept.shape[1]
    return kept if held in (1, heads) else kept.repeat_interleave(heads // held, dim=1)


@dataclass(frozen=True, kw_only=True)
class RowPolicy(Policy):
    """Base of the policies that decide for every query. A subclass writes ``rule``.

    One that goes by positions alone writes ``shows`` too, which an edit runs.
    """

    def shows(self, query: Tensor, key: Tensor, kept: Tensor) -> Tensor:
        """Whether queries see keys, by their positions from the example's first token, where ``kept`` are seen."""
        raise NotImplementedError

    def ends(self, kept: int) -> tuple[int, int] | None:
        """How many first tokens, and how many last ones before it, every query sees, where ``shows`` says no more."""
        return None

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        """Which keys a row sees at ``budget``."""
        raise NotImplementedError

    def keeps(self, reading: Reading, budgets: Sequence[Budget]) -> list[Keep]:
        for budget in budgets:
            self.check(reading.count, budget.count(reading.count))
        return [self.rule(reading, budget) for budget in budgets]
