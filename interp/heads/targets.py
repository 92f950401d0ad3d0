"""Methods that ask how much queries put on one key each: on repeated random tokens, or on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.heads.base import Measured, Scored, Text, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.tokens import bos_tokens
from headscope.interp.runs.provenance import hash_texts
from headscope.interp.statistics import Statistic, TargetMass


@dataclass(frozen=True, kw_only=True)
class TargetMethod(Measured):
    """Mean mass that queries put on the key that ``target`` names, over the queries that have one.

    Args:
        texts: read this text (or these) instead of random tokens, in consecutive windows, each with the tokenizer's
            default special tokens before it; trials of one text are resampled together where there are several.
        length: random tokens before the repetition.
        window: tokens a window of text.
        samples: sequences, each from a seed of its own, or windows of text at most; each is a trial.
        bos: put the tokenizer's BOS token, if it has one, before the random tokens.
        shuffled: a null: look at random targets instead, drawn from this seed; every query that has a target is given
            another key that it sees, each as likely. Samples stay the same.
        seed: of the random tokens.
    """

    nulls: ClassVar[tuple[str, ...]] = ("weights", "targets")

    unit: ClassVar[str] = "mass"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    texts: Text | None = None
    length: int = 50
    window: int = 256
    bos: bool = True
    shuffled: int | None = None

    @staticmethod
    def target(ids: Tensor) -> Tensor:
        """The key that each query of a sequence should look at, -1 for none: (length,)."""
        raise NotImplementedError

    @property
    def resample_by(self) -> str | None:
        return "text" if self.texts is not None and len(self._texts()) > 1 else "sample"

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        if self.texts is None:
            return sequences.repeated_samples(lm, self.length, self.samples, self.seed, bos=self.bos)
        return sequences.text_samples(lm, self._texts(), self.window, self.samples)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        own: dict[str, Any] = {"window": self.window, "texts_sha256": hash_texts(self._texts())}
        if self.texts is None:
            own = {"length": self.length, "bos_token_ids": bos_tokens(lm) if self.bos else []}
        own |= {} if self.shuffled is None else {"shuffled": self.shuffled}
        return {"input": "repeated" if self.texts is None else "text", "samples": self.samples, **own}

    def targets(self, sample: Sample) -> Tensor:
        """The key that each query of a sample is asked about, -1 for none: (length,)."""
        table = self.target(sample.ids)
        if self.shuffled is None:
            return table
        return sequences.other_keys(table, [self.shuffled, int(sample.trial["sample"])])

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [TargetMass({"key": torch.stack([self.targets(sample) for sample in samples])})]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        mass = records[0]["target_mass"].sel(target="key").transpose("example", "layer", "head", "query").to_numpy()
        found: list[Scored] = []
        for one, sample in zip(mass, samples, strict=True):
            has = (self.targets(sample) >= 0).numpy()
            scores = by_head(lm, records[0], one[..., has].mean(axis=-1, dtype=np.float64)) if has.any() else None
            found.append((scores, {"queries": int(has.sum())}))
        return found

    def _texts(self) -> list[str]:
        return [self.texts] if isinstance(self.texts, str) else list(self.texts or [])
