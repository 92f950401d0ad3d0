"""Retrieval heads: how often a head's heaviest key is the needle token that the model emits (Wu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import Scored, discover
from headscope.interp.prompts.decoding import answer_text, check_finite, decode, prefill
from headscope.interp.prompts.haystack import Needles, rouge1_recall
from headscope.interp.prompts.needle import NeedlePrompt, NeedlePrompts
from headscope.interp.prompts.spans import encode
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Trial
from headscope.interp.statistics import TopKeys
from headscope.interp.statistics.queries import Last
from headscope.interp.statistics.spans import Span
from headscope.interp.tracing.tracer import trace

Count = Literal["counter", "set"]
LEAD = "Answer:"  # begins a chat model's turn in the forced control, as the base prompt ends


def retrieval(
    lm: Any,
    *,
    lengths: Sequence[int] | None = None,
    depths: int | Sequence[float] = 10,
    needles: Needles = None,
    haystack: str | Path | None = None,
    count: Count = "counter",
    threshold: float = 0.5,
    paraphrased: bool = False,
    forced: Literal["first", "all"] = "first",
    group: Literal["needle", "text"] | None = "needle",
    chat: bool | None = None,
    max_new_tokens: int = 50,
    newline_stop: bool = False,
    stem: Callable[[str], str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """Retrieval score of every head: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality"
    (arXiv 2404.15574, Section 2, Eq. 1; retrieval_head_detection.py).

    The model answers a question about a needle hidden in a haystack, greedily. At every decoding step a head scores
    where its heaviest key lies in the needle's answer and holds the very token that is emitted. A trial counts if the
    answer's ROUGE-1 recall exceeds ``threshold``; a head's score is its mean over those trials. The paper calls heads
    above 0.1 retrieval heads. The prompt runs without statistics; only decoding rows are traced.

    Args:
        lm: load_model's result, with its tokenizer.
        lengths, depths, needles, haystack, chat, max_new_tokens, newline_stop, stem: as of ``NeedlePrompts``; by
            default the authors' three needles, ten depths and those of their 20 lengths that fit the model's context.
        count: "counter" is the authors' code: each copied token adds 1 / (tokens of the answer), so that a token
            copied twice counts twice and a trial can exceed 1. "set" is the paper's formula |g & k| / |k| on sets of
            distinct tokens, at most 1.
        paraphrased: the method ``retrieval_paraphrased``, a control beyond the paper. The question shares no content
            word with the needle, so no literal match (induction) leads to it. Small models fail most of these in
            free generation; the answer is therefore not generated but teacher-forced (after "Answer:", with which a
            chat model's turn is made to begin), and every trial is kept.
        forced: which rows of the paraphrased control count. "first": the one that must emit the answer's first token,
            where nothing copied so far can lead a head to the needle. "all": also the rows that are fed the answer's
            own tokens, where plain induction finds each next one: those no longer tell retrieval from induction.
        group: what the bootstrap draws as a whole: "needle" (all trials of a needle, so that the interval speaks of
            other needles; with three needles it is about their range: pass needles=10 for a better one), "text"
            (the depths of one needle and length: other placements of these needles), or None (every trial, too narrow).
        out: folder for results and the journal from which a killed run resumes.

    Returns:
        HeadScores (layer, head), in units of the answer (1: all of it copied once); ``details`` has every trial's
        needle, length, depth, response, recall, tokens and position. NaN for layers without softmax attention.

    Raises:
        HeadscopeError: as of ``NeedlePrompts``, a model that cannot be traced, or no trial above ``threshold``.
    """
    if count not in ("counter", "set") or forced not in ("first", "all") or group not in ("needle", "text", None):
        raise HeadscopeError("count is 'counter' or 'set', forced 'first' or 'all', group 'needle', 'text' or None")
    task = NeedlePrompts(lengths, depths, needles, haystack, paraphrased, chat, max_new_tokens, newline_stop, stem)
    trials = [{**trial, "text": f"{trial['needle']} in {trial['length']}"} for trial in task.trials(lm)]
    parameters = {**task.parameters(lm), "count": count}
    parameters |= {"forced": forced} if paraphrased else {"threshold": threshold}

    def score(trial: Trial) -> Scored:
        if paraphrased:
            return _forced_trial(lm, task, trial, count, first_only=forced == "first")
        return _generated_trial(lm, task, trial, count, threshold)

    name = "retrieval_paraphrased" if paraphrased else "retrieval"
    settings: dict[str, Any] = {"parameters": parameters, "seed": 0, "group": group, "out": out, "progress": progress}
    new = 0 if paraphrased else max_new_tokens
    return discover(name, lm, trials, score, tokens=lambda trial: (trial["length"], new), **settings)


def copy_score(
    top: NDArray[np.int64], emitted: Sequence[int], ids: Sequence[int], span: Span, count: Count = "counter"
) -> NDArray[np.float64]:
    """Share of the needle that each head copies (..., head).

    Args:
        top: heaviest key of the row that emitted each token (..., head, step), as positions in the prompt.
        emitted: the emitted token ids (step,).
        ids: the prompt's token ids.
        span: the needle's (first, stop) in ``ids``.
        count: "counter": copies / tokens of the span; "set": distinct token ids copied / distinct ids of the span.
    """
    first, stop = span
    prompt, new = np.asarray(ids), np.asarray(emitted)
    inside = (top >= first) & (top < stop)
    copied = inside & (prompt[np.where(inside, top, first)] == new)
    if count == "counter":
        return np.asarray(copied.sum(axis=-1) / (stop - first), dtype=np.float64)
    distinct = np.unique(prompt[first:stop])
    found = [(copied & (new == token)).any(axis=-1) for token in distinct]
    return np.asarray(np.sum(found, axis=0) / len(distinct), dtype=np.float64)


def _generated_trial(lm: Any, task: NeedlePrompts, trial: Trial, count: Count, threshold: float) -> Scored:
    prompt = task.build(lm, trial)
    with prompt.published():
        cache = prefill(lm, prompt.ids[:-1])
    with prompt.published(), trace(lm, [TopKeys(1)]) as tracer:
        new = decode(lm, cache, prompt.ids[-1], task.max_new_tokens, newline_stop=task.newline_stop)
    response = answer_text(lm, new)
    recall = rouge1_recall(prompt.needle.real_needle, response, stem=task.stem)
    details = {"response": response, "recall": recall, **_place(prompt)}
    if recall <= threshold:
        return None, details
    record = tracer.record
    scores = copy_score(_top_keys(record), new, prompt.ids, prompt.span, count)
    return _all_layers(lm, record, scores), details


def _forced_trial(lm: Any, task: NeedlePrompts, trial: Trial, count: Count, *, first_only: bool) -> Scored:
    """Feed the answer as it stands in the needle, token for token, whatever the model would say."""
    prompt = task.build(lm, trial)
    first, stop = prompt.span
    span = (first, first + 1 if first_only else stop)
    answer = list(prompt.ids[slice(*span)])
    lead = encode(lm.tokenizer, LEAD, special_tokens=False)[0] if task.uses_chat(lm) else []
    most = lm.info.context_length
    if most is not None and len(prompt.ids) + len(lead) + len(answer) > most:
        raise HeadscopeError(f"the prompt and its answer exceed the context of {lm.name} ({most}): shorten the prompt")
    cache = prefill(lm, prompt.ids[:-1])
    fed = torch.tensor([[prompt.ids[-1], *lead, *answer[:-1]]], device=lm.device)
    with trace(lm, [TopKeys(1)], queries=Last(len(answer))) as tracer:
        output = lm.model(input_ids=fed, past_key_values=cache, use_cache=True)
    logits = output.logits[0, -len(answer) :].float()
    check_finite(lm, logits)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer, device=logits.device))
    record = tracer.record
    scores = copy_score(_top_keys(record), answer, prompt.ids, span, count)
    return _all_layers(lm, record, scores), {"loss": float(loss), **_place(prompt)}


def _top_keys(record: xr.Dataset) -> NDArray[np.int64]:
    """Heaviest key of every traced row (layer, head, step)."""
    return np.asarray(record["top_keys"].isel(example=0, rank=0).to_numpy(), dtype=np.int64)


def _all_layers(lm: Any, record: xr.Dataset, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores (layer, head) of every layer of the model: NaN for those without softmax attention."""
    whole = np.full((lm.info.layers, scores.shape[1]), np.nan)
    whole[record["layer"].to_numpy()] = scores
    return whole


def _place(prompt: NeedlePrompt) -> dict[str, int]:
    return {"tokens": len(prompt.ids), "position": prompt.span[0], "answer_tokens": prompt.span[1] - prompt.span[0]}
