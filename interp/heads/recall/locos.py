"""LOCOS: heads that write the answer while they read the needle (logit contribution, needle against the rest)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from headscope.interp.heads.recall.copying import LEAD, place_of
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


@dataclass(frozen=True, kw_only=True)
class Locos(NeedleMethod):
    """Score heads by how much more they write towards the answer from the needle than from as much of the rest.

    Gema et al. 2026, "Logit-Contribution Scoring Identifies Non-Literal Retrieval Heads" (arXiv 2607.01002;
    locos/detectors/logit_contrib.py). For the row t that emits the answer's token y_t, and each key j,
    phi_tj = A_tj u_y^T W_O v_j: u_y the token's unembedding row, W_O the head's slice of the output projection. A
    trial's score is the mean over the answer's rows of sum_(needle) phi - |needle| / |rest| * sum_(rest) phi, in logits
    before the final norm, which the authors leave out, as they do a norm after the projection (Gemma). The rest is
    every other key up to the row. The needle is the whole hidden sentence. The answer's rows are those that emit its
    tokens, as they stand alone, in order, or else its text, without case; a trial without them, or with a ROUGE-1
    recall up to ``threshold``, does not count. A head's score is the mean over trials.

    What differs: the authors probe with NoLiMa, whose questions share no word with the needle; here the questions are
    Wu et al.'s kind unless ``paraphrased``, which small models fail. Keys that a sliding window hides count in |rest|
    (with mass 0); their cache forgets some of them, and the count with them.

    What it does not show: what the head does through later layers, or that the model needs it. (The authors' ablation
    zeroes a head's query, ``AblateHeads(how="uniform")``, not what it writes.)

    Args:
        size: the prompts where lengths, depths and needles do not say otherwise. "small" [OURS]: three needles at
            three depths of 600 tokens. "published": the grid of ``retrieval``'s authors.
        paraphrased: ask each needle's paraphrase.
        forced: [OURS] feed the answer as it stands in the needle instead of what the model says, and keep every trial,
            as small models fail paraphrased questions. A chat model's turn is made to begin with "Answer:".
        ov: False leaves out what is written, phi = A: the authors' attention-only control, in units of mass.
    """

    name: ClassVar[str] = "locos"
    unit: ClassVar[str] = "logits before the final norm"
    source: ClassVar[str] = "arXiv 2607.01002"

    SMALL: ClassVar[Mapping[str, Any]] = {"lengths": (600,), "depths": (0, 50, 100), "needles": 3}

    paraphrased: bool = False
    forced: bool = False
    ov: bool = True

    @cached_property
    def task(self) -> NeedlePrompts:
        """The prompts, with paraphrased questions where asked."""
        return replace(super().task, paraphrased=self.paraphrased)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**super().parameters(lm), "forced": self.forced, "ov": self.ov}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        prompt = self.task.build(lm, trial)
        cache = prefill(lm, prompt.ids[:-1])
        with attached(lm, read := _Reading(prompt.needle_span)):
            new, steps = self._forced(lm, cache, prompt) if self.forced else self._said(lm, cache, prompt)
        response = answer_text(lm, new)
        recall = rouge1_recall(prompt.needle.real_needle, response, stem=self.stem)
        details = {"response": response, "recall": recall, "answer_steps": len(steps), **place_of(prompt)}
        if not steps or (recall <= self.threshold and not self.forced):
            return None, details
        found = np.full((lm.info.layers, lm.info.heads), np.nan)
        if not self.ov:
            for layer, rows in read.rows.items():
                found[layer] = np.mean([rows[t].contrast(rows[t].mass) for t in steps], axis=0)
            return found, details
        writes = HeadWrites(lm)
        if len(writes) != len(read.rows):
            raise HeadscopeError(
                f"{lm.name} has {len(writes)} output projections for {len(read.rows)} attending layers"
            )
        u = unembedding_rows(lm, [new[t] for t in steps])[:, None]  # (step, 1, d_model)
        for place, layer in enumerate(sorted(read.rows)):
            rows = [read.rows[layer][t] for t in steps]
            z = torch.stack([row.contrast(row.z) for row in rows])  # linear, so W_O of the contrast of both parts
            written = writes.of(place, z)
            found[layer] = (written * u.to(written.device)).sum(-1).mean(0).double().cpu().numpy()
        if not np.isfinite(found[sorted(read.rows)]).all():
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


@dataclass(frozen=True, eq=False)
class _Row:
    """What a row took of the needle and of the rest: ``mass`` (2, head) and ``z`` (2, head, d_value), float32."""

    mass: Tensor
    z: Tensor
    needle: int
    rest: int

    def contrast(self, parts: Tensor) -> Tensor:
        """Needle - needle / rest * rest."""
        return parts[0] - self.needle / self.rest * parts[1]


class _Reading(Handler):
    """The rows of single-row passes, by layer, in their order."""

    only_reads = True

    def __init__(self, needle: Span) -> None:
        self.needle = needle
        self.rows: dict[int, list[_Row]] = {}

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        first, stop = self.needle
        p = call.pattern()[0, :, -1]  # (head, key)
        at = torch.arange(p.shape[1], device=p.device) + call.mask.key_offset
        inside = (at >= first) & (at < stop)
        split = torch.stack([p * inside, p * ~inside])  # (2, head, key)
        values = call.value[0].to(p.dtype)  # (kv head, key, d_value)
        grouped = split.view(2, values.shape[0], -1, p.shape[1])
        read = torch.einsum("sgnk,gkd->sgnd", grouped, values).reshape(2, p.shape[0], -1)
        needle, keys = stop - first, call.mask.query_offset + 1
        self.rows.setdefault(call.layer, []).append(_Row(split.sum(-1), read, needle, keys - needle))
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
