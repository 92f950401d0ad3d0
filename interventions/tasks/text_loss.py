"""Next-token loss on prose: what an edit costs the model in general."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts import load_haystack
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts


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
