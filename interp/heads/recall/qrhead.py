"""Query-focused retrieval heads: the query's attention on the documents that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Scored, by_head, per_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.documents import Question, bundled_questions, document_prompt, load_questions
from headscope.interp.prompts.sequences import Sample
from headscope.interp.runs.provenance import hash_texts
from headscope.interp.statistics import KeyMass, Statistic

OUTLIER = 2.0  # standard deviations below a document's mean


@dataclass(frozen=True, kw_only=True)
class QRHead(Measured):
    """Score heads by the query's attention on the documents that answer it, beyond what any query pays them.

    Zhang et al. 2025, "Query-Focused Retrieval Heads Improve Long-Context Reasoning and Re-ranking" (arXiv 2506.09944;
    src/qrretriever/attn_retriever.py, exp_scripts/detection/detect_qrhead_lme.py). s_k is the mean of A[i, k] over the
    query's rows i: from the late instruction ("Please find ...") to the end of the prompt. Calibrated, it is s_k of the
    question minus s_k of the query "N/A" after the same documents. A document's score is the sum of the calibrated s_k
    over its tokens, those at or below its mean - 2 standard deviations (n - 1) left out. A question's score is the sum
    over its gold documents; a head's is the mean over questions. Heads are ranked by it; a negative one looks at the
    gold documents less than "N/A" does.

    The prompt is the authors': instruction, documents "[i] text", late instruction, "Query: q", in the model's chat
    template instead of Llama's (none for a base model). They use LongMemEval or BEIR with 70 questions or so.

    What it does not show: that the head reads what it looks at, or that the model answers; on the bundled needles, that
    it would find documents that share no word with their question.

    Args:
        questions: ``Question`` objects of ``headscope.interp.prompts.documents``, or a file in the authors' form.
            [OURS] By default those of the bundled needles, each set into a passage among others.
        documents: passages a bundled question.
        length: tokens of a bundled passage, which ends with the sentence that they end in.
    """

    name: ClassVar[str] = "qrhead"
    unit: ClassVar[str] = "mass"
    range: ClassVar[tuple[float, float] | None] = (-1.0, 1.0)
    source: ClassVar[str] = "arXiv 2506.09944"
    tests: ClassVar[str] = "heads/test_documents_and_sentences.py"
    reproduced: ClassVar[str] = (
        "the authors' prompt; calibrated scores against eager weights of a tiny model and of SmolLM2; outliers by hand"
    )
    not_reproduced: ClassVar[str] = "LongMemEval and BEIR, and the paper's models"

    questions: Sequence[Question] | str | Path | None = None
    documents: int = 8
    length: int = 100
    samples: int = 10
    batch: int = 1

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        return [pair[0] for pair in self._pairs(lm)]

    def views(self, lm: LanguageModel, sample: Sample) -> tuple[Sample, ...]:
        """The question, and "N/A" after the same documents."""
        return self._pairs(lm)[sample.trial["sample"]]

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [KeyMass(queries=tuple((q[0], q[1]) for q in (sample.trial["query"] for sample in samples)))]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        masses = [record["key_mass"].transpose("example", "layer", "head", "key").to_numpy() for record in records]
        found: list[Scored] = []
        for b, sample in enumerate(samples):
            rows = [sample.trial["query"], sample.trial["null"]]
            end = rows[0][0]  # documents end before the query, where both prompts are the same
            s = [by_head(lm, records[0], m[b][..., :end] / (q[1] - q[0])) for m, q in zip(masses, rows, strict=True)]
            each = [document_score((s[0] - s[1])[..., slice(*span)]) for span in sample.trial["documents"]]
            gold = sample.trial["gold"]
            total = np.sum([each[i] for i in gold], axis=0) if gold else np.where(np.isnan(each[0]), np.nan, 0.0)
            found.append((total, {"tokens": len(sample.ids)}))
        return found

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        if self.questions is None:
            return {**held, "questions": "bundled"}
        return {**held, "questions": hash_texts([str(asdict(one)) for one in self._asked(lm)])}

    def _asked(self, lm: LanguageModel) -> list[Question]:
        given: Sequence[Question]
        if self.questions is None:
            given = bundled_questions(lm, self.samples, self.documents, self.length)
        else:
            given = load_questions(self.questions) if isinstance(self.questions, str | Path) else self.questions
        if not given or not all(one.documents for one in given):
            raise HeadscopeError("QRHead needs at least one question, with at least one document each")
        return list(given)[: self.samples]

    def _pairs(self, lm: LanguageModel) -> list[tuple[Sample, Sample]]:
        """Both prompts of every question."""
        return per_model(self, lm, lambda: [_pair(lm, i, one) for i, one in enumerate(self._asked(lm))])


def document_score(calibrated: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over a document's tokens (..., key), outliers at the bottom left out; one token has no spread."""
    spread = calibrated.std(axis=-1, ddof=1, keepdims=True) if calibrated.shape[-1] > 1 else np.nan
    kept = calibrated > calibrated.mean(axis=-1, keepdims=True) - OUTLIER * spread
    return np.where(np.isnan(calibrated).any(-1), np.nan, np.where(kept, calibrated, 0.0).sum(axis=-1))


def _pair(lm: LanguageModel, index: int, one: Question) -> tuple[Sample, Sample]:
    """The prompts of a question and of "N/A"."""
    asked, null = (document_prompt(lm, one.documents, query) for query in (one.question, "N/A"))
    end = asked.query[0]
    if null.query[0] != end or null.ids[:end] != asked.ids[:end]:
        raise HeadscopeError(f"the tokenizer of {lm.name} writes the documents otherwise before another query")
    trial = {"sample": index, "question": one.question, "gold": list(one.gold), "null": list(null.query)}
    trial |= {"documents": [list(span) for span in asked.documents], "query": list(asked.query)}
    first = Sample(trial, torch.tensor(asked.ids))
    return first, Sample({**trial, "query": list(null.query)}, torch.tensor(null.ids))
