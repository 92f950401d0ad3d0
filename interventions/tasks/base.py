"""What ``evaluate`` needs of a task."""

from __future__ import annotations

from typing import Any, Protocol

from headscope.interp.runs.journal import Trial


class Task(Protocol):
    """What ``evaluate`` needs of a task. ``trials`` are JSON-able; ``run`` returns at least ``{"score": float}``."""

    @property
    def name(self) -> str:
        """What results call it; two tasks of one evaluation have different names."""

    @property
    def metric(self) -> str:
        """What a score means, with its unit."""

    def trials(self, model: Any) -> list[Trial]:
        """The trials for this model, the same at every call."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings, JSON-able: two runs with equal settings have equal trials."""

    def tokens(self, trial: Trial) -> tuple[int, int]:
        """A trial's prompt tokens and generated tokens, for estimates."""

    def run(self, model: Any, trial: Trial) -> dict[str, Any]:
        """Run one trial on the model as it is now (interventions included)."""
