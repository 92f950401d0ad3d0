"""Retrieval heads that no literal match leads: the question shares no content word with the needle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.recall.copied_needle import LEAD, copy_score, place_of, top_keys
from headscope.interp.heads.recall.retrieval import Retrieval
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.decoding import check_finite, prefill
from headscope.interp.prompts.needle import NeedlePrompts
from headscope.interp.prompts.spans import encode
from headscope.interp.runs.journal import Trial
from headscope.interp.statistics import TopKeys
from headscope.interp.statistics.queries import Last
from headscope.interp.tracing.recording import trace


@dataclass(frozen=True, kw_only=True)
class RetrievalParaphrased(Retrieval):
    """Score heads by the share of a needle's answer that they look up when the question shares no word with the needle.

    [OURS] A control beyond Wu et al. 2024 (arXiv 2404.15574): no literal match (induction) leads to the needle. Small
    models fail most of these questions in free generation, so the answer is not generated but teacher-forced (after
    "Answer:", with which a chat model's turn is made to begin), and every trial is kept.

    What it does not show: that the model would have given the answer.

    Args:
        forced: which rows count. "first": the one that must emit the answer's first token, where nothing copied so far
            can lead a head to the needle. "all": also the rows that are fed the answer's own tokens, where plain
            induction finds each next one: those no longer tell retrieval from induction.
    """

    name: ClassVar[str] = "retrieval_paraphrased"
    tests: ClassVar[str] = "heads/test_retrieval.py"
    reproduced: ClassVar[str] = "known attention; induction heads score 0 where no word is shared"
    not_reproduced: ClassVar[str] = "no paper: a control of ours"

    forced: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forced not in ("first", "all"):
            raise HeadscopeError(f"forced is 'first' or 'all', not {self.forced!r}")

    @cached_property
    def task(self) -> NeedlePrompts:
        """The prompts, with each needle's paraphrased question."""
        return replace(super().task, paraphrased=True)

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        return trial["length"], 0

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        own = {name: value for name, value in super().parameters(lm).items() if name != "threshold"}
        return {**own, "forced": self.forced}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        """Feed the answer as it stands in the needle, token for token, whatever the model would say."""
        prompt = self.task.build(lm, trial)
        first, stop = prompt.span
        span = (first, first + 1 if self.forced == "first" else stop)
        answer = list(prompt.ids[slice(*span)])
        lead = encode(lm.tokenizer, LEAD, special_tokens=False)[0] if self.task.uses_chat(lm) else []
        most = lm.info.context_length
        if most is not None and len(prompt.ids) + len(lead) + len(answer) > most:
            raise HeadscopeError(
                f"the prompt and its answer exceed the context of {lm.name} ({most}): shorten the prompt"
            )
        cache = prefill(lm, prompt.ids[:-1])
        fed = torch.tensor([[prompt.ids[-1], *lead, *answer[:-1]]])
        with trace(lm, [TopKeys(1)], queries=Last(len(answer))) as tracer:
            output = lm.forward(fed, cache=cache)
        logits = output.logits[0, -len(answer) :].float()
        check_finite(lm, logits)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device))
        scores = copy_score(top_keys(tracer.record), answer, prompt.ids, span, self.count)
        return by_head(lm, tracer.record, scores), {"loss": float(loss), **place_of(prompt)}
