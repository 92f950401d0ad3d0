"""Base of the tasks that ask about pictures: chats through the model's own processor, answered in padded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.processors import processor_of
from headscope.interp.prompts.pictures import Message
from headscope.interp.prompts.vision import VisionPrompt, vision_prompt
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task, check_least

_PROCESSORS: WeakKeyDictionary[LanguageModel, Any] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class VisionTask(Task):
    """Base of the tasks whose trials are chats with pictures. A subclass writes ``trials``, ``chat`` and ``grade``.

    ``batch`` chats are read together, padded to the left, and answered greedily with a cache by the model's
    ``generate``, so that edits which choose for each prompt, and ways of choosing tokens, act on each chat of a batch
    for itself. Prompts publish the spans of ``vision_prompt`` (``image``, ``instruction``, ``response`` ...) and where
    they end.

    Args:
        batch: chats at a time.
        max_new_tokens: of an answer.
    """

    batch: int = 8
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, batch=1, max_new_tokens=1)

    @property
    def together(self) -> int:
        """A batch."""
        return self.batch

    def chat(self, lm: LanguageModel, trial: Trial) -> Sequence[Message]:
        """A trial's messages, as the processor's chat template takes them."""
        raise NotImplementedError

    def grade(self, lm: LanguageModel, trial: Trial, response: str) -> dict[str, Any]:
        """What an answer scores: at least ``{"score": float}``."""
        raise NotImplementedError

    def prompt(self, lm: LanguageModel, trials: Sequence[Trial]) -> VisionPrompt:
        """The chats of trials as one batch, padded to the left."""
        return vision_prompt(lm, left_padding(lm), [self.chat(lm, trial) for trial in trials])

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The tokens of the first trial's prompt, for all; the most that are generated."""
        held: dict[str, int] = vars(self).setdefault("_widths", {})
        if lm.name not in held:
            held[lm.name] = int(self.prompt(lm, self.trials(lm)[:1]).inputs["input_ids"].shape[1])
        return held[lm.name], self.max_new_tokens

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """One trial by itself."""
        return self.run_together(lm, [trial])[0]

    def run_together(self, lm: LanguageModel, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Answers to a batch of chats, and what they score; ``response`` is the answer's text."""
        prompt = self.prompt(lm, trials)
        with prompt.published(), torch.no_grad():
            ids = lm.model.generate(**prompt.inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = ids[:, prompt.inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in lm.required_tokenizer().batch_decode(new, skip_special_tokens=True)]
        return [{**self.grade(lm, trial, text), "response": text} for trial, text in zip(trials, texts, strict=True)]


def left_padding(lm: LanguageModel) -> Any:
    """The model's processor, of which a copy that pads to the left is kept.

    Raises:
        HeadscopeError: the model came without one.
    """
    if lm not in _PROCESSORS:
        found = processor_of(lm)
        made = copy.copy(found)
        made.tokenizer = copy.deepcopy(found.tokenizer)
        made.tokenizer.padding_side = "left"
        _PROCESSORS[lm] = made
    return _PROCESSORS[lm]
