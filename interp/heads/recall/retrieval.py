"""Retrieval heads: how often a head's heaviest key is the needle token that the model emits (Wu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.recall.copied_needle import Count, copy_score, place_of, top_keys
from headscope.interp.heads.recall.needle_method import NeedleMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.decoding import answer_text, decode, prefill
from headscope.interp.prompts.haystack import rouge1_recall
from headscope.interp.runs.journal import Trial
from headscope.interp.statistics import TopKeys
from headscope.interp.tracing.recording import trace


@dataclass(frozen=True, kw_only=True)
class Retrieval(NeedleMethod):
    """Score heads by the share of a needle's answer that they copy while the model answers.

    Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality" (arXiv 2404.15574, Section 2,
    Eq. 1; retrieval_head_detection.py). The model answers a question about a needle hidden in a haystack, greedily. At
    every decoding step a head scores where its heaviest key lies in the needle's answer and holds the very token that
    is emitted. A trial counts if the answer's ROUGE-1 recall exceeds ``threshold``; a head's score is its mean over
    those trials, in units of the answer (1: all of it copied once). The paper calls heads above 0.1 retrieval heads.
    The prompt runs without statistics; only decoding rows are traced.

    What it does not show: that the head finds the needle by meaning. An induction head copies it too, once the first
    token is out: compare ``retrieval_paraphrased``.

    Args:
        count: "counter" is the authors' code: each copied token adds 1 / (tokens of the answer), so that a token
            copied twice counts twice and a trial can exceed 1. "set" is the paper's formula |g & k| / |k| on sets of
            distinct tokens, at most 1.
    """

    name: ClassVar[str] = "retrieval"
    unit: ClassVar[str] = "share of the answer copied"
    source: ClassVar[str] = "arXiv 2404.15574"
    tests: ClassVar[str] = "heads/test_retrieval_real.py"
    reproduced: ClassVar[str] = (
        "scores of SmolLM2's own answers against eager maps, to 1e-9; known attention; sparse as the paper "
        "finds (over 40 % of heads at 0)"
    )
    not_reproduced: ClassVar[str] = "Llama-2-7B's heads and lengths of 50,000 tokens"

    count: Count = "counter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count not in ("counter", "set"):
            raise HeadscopeError(f"count is 'counter' or 'set', not {self.count!r}")

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**super().parameters(lm), "count": self.count}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        prompt = self.task.build(lm, trial)
        cache = prefill(lm, prompt.ids[:-1])
        with trace(lm, [TopKeys(1)]) as tracer:
            new = decode(lm, cache, prompt.ids[-1], self.max_new_tokens, newline_stop=self.newline_stop)
        response = answer_text(lm, new)
        recall = rouge1_recall(prompt.needle.real_needle, response, stem=self.stem)
        details = {"response": response, "recall": recall, **place_of(prompt)}
        if recall <= self.threshold:
            return None, details
        scores = copy_score(top_keys(tracer.record), new, prompt.ids, prompt.span, self.count)
        return by_head(lm, tracer.record, scores), details
