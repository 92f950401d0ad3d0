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

    A passage is a prompt: nothing of it is generated, so that edits that act while decoding change nothing here.

    Args:
        passages: how many.
        length: their tokens.
        text: where they are from (None: the bundled haystack).
    """

    passages: int = 4
    length: int = 512
    text: str | None = None

    name: ClassVar[str] = "text_loss"
    metric: ClassVar[str] = "nats per token"
    unit: ClassVar[str] = "nats per token"
    higher_is_better: ClassVar[bool | None] = False
    source: ClassVar[str] = "mean cross-entropy of the next token"

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """Number and length of the passages, and the text's SHA-256."""
        return {"passages": self.passages, "length": self.length, "text_sha256": hash_texts([self._text()])}

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
        with torch.no_grad(), published_spans({"passage": (0, ids.shape[1])}), prompt_boundary(ids.shape[1]):
            found: Tensor = lm.model(input_ids=ids).logits[0]
        return found
