"""What LOCOS and its baselines read: what the rows that emit an answer take of the needle and of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.recall.copied_needle import LEAD, place_of
from headscope.interp.heads.recall.needle_method import NeedleMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.writing import HeadWrites, unembedding_rows
from headscope.interp.prompts.decoding import answer_text, decode, prefill, stop_tokens
from headscope.interp.prompts.haystack import rouge1_recall
from headscope.interp.prompts.needle import NeedlePrompt, NeedlePrompts
from headscope.interp.prompts.spans import encode
from headscope.interp.runs.journal import Trial
from headscope.interp.sites import attached
from headscope.interp.statistics.spans import Span


@dataclass(frozen=True, eq=False)
class Row:
    """What a row took of the needle and of the rest: ``mass`` (2, head) and ``z`` (2, head, d_value), float32, from so
    many keys ``needle`` and ``rest``; ``top`` (head,) counts the needle's keys among the row's heaviest."""

    mass: Tensor
    z: Tensor
    top: Tensor
    needle: int
    rest: int

    def contrast(self, parts: Tensor) -> Tensor:
        """Needle - needle / rest * rest."""
        return parts[0] - self.needle / self.rest * parts[1]


@dataclass(frozen=True, eq=False)
class Answer:
    """A trial that counts: its prompt, the emitted tokens, which of them are the answer, and every row by layer."""

    prompt: NeedlePrompt
    new: Sequence[int]
    steps: Sequence[int]
    rows: Mapping[int, Sequence[Row]]

    def mean(self, lm: LanguageModel, of: Callable[[Row], Tensor], steps: Sequence[int]) -> NDArray[np.float64]:
        """Mean over ``steps`` of what ``of`` says of a row's heads: (layer, head), NaN in layers without attention."""
        found = np.full((lm.info.layers, lm.info.heads), np.nan)
        for layer, rows in self.rows.items():
            found[layer] = torch.stack([of(rows[t]) for t in steps]).double().mean(0).cpu().numpy()
        return found

    def logits(self, lm: LanguageModel, of: Callable[[Row], Tensor]) -> NDArray[np.float64]:
        """Mean over the answer's rows of u W_O z, u the unembedding row of the token that each emits and z = ``of``
        a row (head, d_value), before the final norm: (layer, head)."""
        writes = HeadWrites(lm)
        if len(writes) != len(self.rows):
            raise HeadscopeError(
                f"{lm.name} has {len(writes)} output projections for {len(self.rows)} attending layers"
            )
        found = np.full((lm.info.layers, lm.info.heads), np.nan)
        u = unembedding_rows(lm, [self.new[t] for t in self.steps])[:, None]  # (step, 1, d_model)
        for place, layer in enumerate(sorted(self.rows)):
            written = writes.of(place, torch.stack([of(self.rows[layer][t]) for t in self.steps]))
            found[layer] = (written * u.to(written.device)).sum(-1).mean(0).double().cpu().numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class AnswerMethod(NeedleMethod):
    """Base of the methods that score a trial by the rows that emit its answer.

    The answer's rows are those that emit its tokens, as they stand alone, in order, or else its text, without case; a
    trial without them, or with a ROUGE-1 recall up to ``threshold``, does not count. The needle is the whole hidden
    sentence; the rest is every other key up to the row.

    Args:
        size: the prompts where lengths, depths and needles do not say otherwise. "small" [OURS]: three needles at
            three depths of 600 tokens. "published": the grid of ``retrieval``'s authors.
        paraphrased: ask each needle's paraphrase.
        forced: [OURS] feed the answer as it stands in the needle instead of what the model says, and keep every trial,
            as small models fail paraphrased questions. A chat model's turn is made to begin with "Answer:".
    """

    SMALL: ClassVar[Mapping[str, Any]] = {"lengths": (600,), "depths": (0, 50, 100), "needles": 3}

    paraphrased: bool = False
    forced: bool = False

    @property
    def heaviest(self) -> int:
        """Of how many of a row's heaviest keys it is counted how many lie in the needle."""
        return 0

    @cached_property
    def task(self) -> NeedlePrompts:
        """The prompts, with paraphrased questions where asked."""
        return replace(super().task, paraphrased=self.paraphrased)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**super().parameters(lm), "forced": self.forced}

    def of_answer(self, lm: LanguageModel, answer: Answer) -> NDArray[np.float64] | None:
        """Scores (layer, head) of a trial that has an answer, or None where it does not count after all."""
        raise NotImplementedError

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        prompt = self.task.build(lm, trial)
        cache = prefill(lm, prompt.ids[:-1])
        with attached(lm, read := _Reading(prompt.needle_span, self.heaviest)):
            new, steps = self._forced(lm, cache, prompt) if self.forced else self._said(lm, cache, prompt)
        response = answer_text(lm, new)
        recall = rouge1_recall(prompt.needle.real_needle, response, stem=self.stem)
        details = {"response": response, "recall": recall, "answer_steps": len(steps), **place_of(prompt)}
        if not steps or (recall <= self.threshold and not self.forced):
            return None, details
        found = self.of_answer(lm, Answer(prompt, new, steps, read.rows))
        if found is not None and not np.isfinite(found[sorted(read.rows)]).all():
            raise HeadscopeError(f"{lm.name} writes values that are not numbers: load it with dtype='float32'")
        return found, details

    def _said(self, lm: LanguageModel, cache: Any, prompt: NeedlePrompt) -> tuple[list[int], list[int]]:
        """What the model says, and at which steps the answer."""
        new = decode(lm, cache, prompt.ids[-1], self.max_new_tokens, newline_stop=self.newline_stop)
        new = new[:-1] if new and new[-1] in stop_tokens(lm) else new
        return new, answer_steps(lm.tokenizer, new, prompt.needle.real_needle)

    def _forced(self, lm: LanguageModel, cache: Any, prompt: NeedlePrompt) -> tuple[list[int], list[int]]:
        """The answer as it is fed, after a chat model's lead, and its steps."""
        lead = encode(lm.tokenizer, LEAD, special_tokens=False)[0] if self.task.uses_chat(lm) else []
        new = [*lead, *prompt.ids[slice(*prompt.span)]]
        for token in (prompt.ids[-1], *new[:-1]):
            lm.forward(torch.tensor([[token]]), cache=cache)
        return new, list(range(len(lead), len(new)))


class _Reading(Handler):
    """The rows of single-row passes, by layer, in their order."""

    only_reads = True

    def __init__(self, needle: Span, heaviest: int) -> None:
        self.needle, self.heaviest = needle, heaviest
        self.rows: dict[int, list[Row]] = {}

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        first, stop = self.needle
        p = call.pattern()[0, :, -1]  # (head, key)
        at = torch.arange(p.shape[1], device=p.device) + call.mask.key_offset
        inside = (at >= first) & (at < stop)
        split = torch.stack([p * inside, p * ~inside])  # (2, head, key)
        values = call.value[0].to(p.dtype)  # (kv head, key, d_value)
        grouped = split.view(2, values.shape[0], -1, p.shape[1])
        read = torch.einsum("sgnk,gkd->sgnd", grouped, values).reshape(2, p.shape[0], -1)
        top = inside[p.topk(min(self.heaviest, p.shape[1])).indices].sum(-1)
        needle, keys = stop - first, call.mask.query_offset + 1
        self.rows.setdefault(call.layer, []).append(Row(split.sum(-1), read, top, needle, keys - needle))
        return z


def answer_steps(tokenizer: Any, emitted: Sequence[int], answer: str) -> list[int]:
    """Which of the emitted tokens are the answer's: its own token ids in order, or else those that hold its text."""
    alone = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    for first in range(len(emitted) - len(alone) + 1):
        if alone and list(emitted[first : first + len(alone)]) == alone:
            return list(range(first, first + len(alone)))
    pieces = [str(tokenizer.decode([token])).lower() for token in emitted]
    ends: NDArray[np.int64] = np.cumsum([0, *map(len, pieces)])
    at = "".join(pieces).find(answer.lower())
    if at < 0:
        return []
    return [i for i in range(len(pieces)) if ends[i + 1] > at and ends[i] < at + len(answer)]
