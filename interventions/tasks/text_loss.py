"""Next-token loss on prose: what an edit costs the model in general."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack, prompt_boundary, published_spans
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts
from headscope.interventions.tasks.base import Task


@dataclass(frozen=True)
class TextLoss(Task):
    """Next-token loss on prose, in nats a token: what an edit costs the model in general.

    A passage is a prompt: nothing of it is generated, so that edits that act while decoding (``"decode"``) change
    nothing here, and those of ``"answer"`` only the last row, whose prediction is not scored. ``written=True`` takes
    every token after the first for one that the model wrote, so that such edits act on all rows; ``evaluate`` says
    where an edit needs it.

    Args:
        passages: how many.
        length: their tokens.
        text: the prose itself (None: the bundled haystack).
        written: the passage counts as generated after its first token.
    """

    passages: int = 4
    length: int = 512
    text: str | None = None
    written: bool = False

    name: ClassVar[str] = "text_loss"
    metric: ClassVar[str] = "nats per token"
    unit: ClassVar[str] = "nats per token"
    higher_is_better: ClassVar[bool | None] = False
    source: ClassVar[str] = "mean cross-entropy of the next token"

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """Number and length of the passages, and the text's SHA-256."""
        held = {"passages": self.passages, "length": self.length, "text_sha256": hash_texts([self._text()])}
        return held | ({"written": True} if self.written else {})

    def _text(self) -> str:
        return self.text if self.text is not None else load_haystack(None)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """One trial a passage: its token ids."""
        if self.passages < 1 or self.length < 2:
            raise HeadscopeError(f"{self.name} needs at least 1 passage of at least 2 tokens")
        ids = lm.required_tokenizer()(self._text(), verbose=False)["input_ids"]
        if len(ids) < self.length:
            raise HeadscopeError(f"{self.name} needs {self.length} tokens of text and was given {len(ids)}")
        count = min(self.passages, len(ids) // self.length)
        step = len(ids) // count
        return [{"passage": i, "ids": ids[i * step : i * step + self.length]} for i in range(count)]

    def unseen(self, during: str) -> str:
        """Why an edit of this phase changes nothing of the score; empty where it may."""
        if self.written or during not in ("decode", "answer"):
            return ""
        return f"{self.name} generates nothing: give written=True to count its passages as what the model wrote"

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The passage's tokens; nothing is generated."""
        return len(trial["ids"]), 0

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Mean cross-entropy of every token after the first."""
        logits = self.logits(lm, trial)[:-1].float()
        following = torch.tensor(trial["ids"][1:], device=logits.device)
        return {"score": float(torch.nn.functional.cross_entropy(logits, following))}

    def logits(self, lm: LanguageModel, trial: Trial) -> Tensor:
        """The passage's logits (token, vocabulary) by the model as it is; publishes the span ``passage``."""
        ids = torch.tensor([trial["ids"]], device=lm.device)
        read = 1 if self.written else ids.shape[1]
        with torch.no_grad(), published_spans({"passage": (0, ids.shape[1])}), prompt_boundary(read):
            found: Tensor = lm.model(input_ids=ids).logits[0]
        return found
