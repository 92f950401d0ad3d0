"""Methods that read chats with pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod, per_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.look import Look, look, sample_of
from headscope.interp.prompts.vision_data import VisionData, listed, vision_items
from headscope.interp.runs.journal import Trial


@dataclass(frozen=True, kw_only=True)
class ChatMethod(HeadMethod):
    """Base of the methods that read chats with pictures through the model's own processor.

    Args:
        data: the chats: a folder of pictures, a .jsonl file, an iterable of chats or ``VisionItem``, or one of these
            (``headscope.interp.prompts.vision_data``); None: scenes drawn here, as ``llava-smollm2`` knows them.
        samples: chats at most; each is a trial.
    """

    reads: ClassVar[Literal["text", "images"]] = "images"

    data: VisionData = None
    samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise HeadscopeError(f"samples={self.samples}: ask for at least 1")
        if not (self.data is None or isinstance(self.data, str | Path)):
            object.__setattr__(self, "data", listed(self.data, self.samples))

    def looks(self, lm: LanguageModel) -> list[Look]:
        """The chats as the model reads them."""
        return per_model(self, lm, lambda: [look(lm, item) for item in vision_items(self.data, self.samples)], "looks")

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [{"sample": i, "name": one.item.name} for i, one in enumerate(self.looks(lm))]

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        return len(self.looks(lm)[trial["sample"]].ids), 0

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        keys = "|".join(str(sample_of(lm, i, one.prompt).key) for i, one in enumerate(self.looks(lm)))
        return {**super().parameters(lm), "data": hashlib.sha256(keys.encode()).hexdigest()}
