"""Methods that ask how far a loss depends on each head: what they read, and how it becomes trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod, Text, per_model
from headscope.interp.heads.causal.gates import Tokens
from headscope.interp.heads.causal.settings import tokenized
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.patterns import Pair, load_pairs
from headscope.interp.prompts.tokens import start_tokens
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts


@dataclass(frozen=True, kw_only=True)
class ImportanceMethod(HeadMethod):
    """A method of a loss: of a text, or of targets after prompts.

    The loss L of a text is the mean over its tokens after the first (after BOS, where the tokenizer puts one) of
    -log p(token | those before), in nats; of a pair the mean over its target's tokens.

    Args:
        texts: whose beginnings are read (by default passages of the bundled prose).
        length: tokens of each text; a shorter one is refused.
        samples: texts or pairs at most; each is a trial, and the intervals resample them.
        pairs: instead of texts, (prompt, target) pairs or a file of them, as of ``head_gating``.
    """

    unit: ClassVar[str] = "nats"

    texts: Text | None = None
    length: int = 64
    samples: int = 20
    pairs: Sequence[Pair] | str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts is not None and self.pairs is not None:
            raise HeadscopeError("give texts or pairs, not both")
        if self.samples < 1:
            raise HeadscopeError(f"samples={self.samples}: ask for at least 1")

    @property
    def resample_by(self) -> str | None:
        return "sample"

    def examples(self, lm: LanguageModel) -> list[Tokens]:
        """What is read, and what should follow it; the same at every call."""
        return per_model(self, lm, lambda: self._examples(lm))

    def _examples(self, lm: LanguageModel) -> list[Tokens]:
        if self.pairs is not None:
            return tokenized(lm, load_pairs(self.pairs)[: self.samples])
        first = max(1, len(start_tokens(lm)))
        found = [one.ids.tolist() for one in sequences.first_windows(lm, self.texts, self.length, self.samples)]
        return [(ids[:first], ids[first:]) for ids in found]

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [{"sample": i} for i in range(len(self.examples(lm)))]

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        if self.pairs is not None:
            held["pairs"] = hash_texts([part for pair in load_pairs(self.pairs) for part in pair])
        return held
