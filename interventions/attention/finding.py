"""Base of the edits that find keys while they read a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headscope.interventions.attention.found import Found
from headscope.interventions.attention.pattern_edit import PatternEdit


@dataclass(frozen=True, eq=False)
class FindingEdit(PatternEdit):
    """An edit of patterns with a memory of what it ``found``, one for each block in which it is in force."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_found", Found())

    @property
    def found(self) -> Found:
        """What was found in the prompt that is being read."""
        held: Found = vars(self)["_found"]
        return held

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """A pass begins, perhaps on a cache."""
        self.found.begin(inputs)

    def fill_cache(self, cache: Any) -> None:
        """The pass left its keys in this cache."""
        self.found.fill(cache)

    def abort_forward(self) -> None:
        """What was found may be half of it."""
        self.found.forget()
