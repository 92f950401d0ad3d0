"""Evaluation tasks: trials that a model runs, each giving one score. To add one: a class here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.needle import NeedleTask, load_haystack
from headscope.interp.provenance import hash_texts

Trial = dict[str, Any]


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


@dataclass(frozen=True)
class TextLoss:
    """Next-token loss on prose, in nats a token (lower is better): what an edit costs the model in general.

    ``passages`` passages of ``length`` tokens from the bundled haystack, or from ``text``.
    """

    passages: int = 4
    length: int = 512
    text: str | None = None
    name: str = "text_loss"
    metric: str = "nats per token"

    @property
    def parameters(self) -> dict[str, Any]:
        """Number and length of the passages, and the text's SHA-256."""
        return {"passages": self.passages, "length": self.length, "text_sha256": hash_texts([self._text()])}

    def _text(self) -> str:
        return self.text if self.text is not None else load_haystack(None)

    def trials(self, model: Any) -> list[Trial]:
        """One trial a passage: its token ids."""
        if self.passages < 1 or self.length < 2:
            raise HeadscopeError("text_loss needs at least 1 passage of at least 2 tokens")
        ids = model.tokenizer(self._text(), verbose=False)["input_ids"]
        if len(ids) < self.length:
            raise HeadscopeError(f"text_loss needs {self.length} tokens of text and was given {len(ids)}")
        count = min(self.passages, len(ids) // self.length)
        step = len(ids) // count
        return [{"passage": i, "ids": ids[i * step : i * step + self.length]} for i in range(count)]

    def tokens(self, trial: Trial) -> tuple[int, int]:
        """The passage's tokens; nothing is generated."""
        return len(trial["ids"]), 0

    def run(self, model: Any, trial: Trial) -> dict[str, Any]:
        """Mean cross-entropy of every token after the first."""
        ids = torch.tensor([trial["ids"]], device=model.model.device)
        with torch.no_grad():
            logits = model.model(input_ids=ids).logits[0, :-1].float()
        return {"score": float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))}


TASKS: dict[str, Callable[..., Task]] = {"needle": NeedleTask, "text_loss": TextLoss}


def resolve(tasks: Sequence[str | Task]) -> list[Task]:
    """Tasks from names (with default settings) or task objects; a single name stands for a list of it."""
    found: list[Task] = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if not isinstance(task, str):
            found.append(task)
        elif task in TASKS:
            found.append(TASKS[task]())
        else:
            raise HeadscopeError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if not found:
        raise HeadscopeError("name at least one task to evaluate, e.g. tasks=['needle']")
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise HeadscopeError(f"two tasks have the same name ({', '.join(sorted(names))}); evaluate them separately")
    return found
