"""Kinds of heads by what sparse patterns lose of them: MInference's classes, DuoAttention's retrieval heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import Policy
from headscope.interp.cache.rows.block_sparse import BlockSparse
from headscope.interp.cache.rows.streaming_llm import StreamingLLM
from headscope.interp.cache.rows.vertical_slash import VerticalSlash
from headscope.interp.cache.survey import lose
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.cache import CacheLosses
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.minference import HeadPatterns, SparsePattern
from headscope.interp.results.scores import HeadScores
from headscope.interp.sites.given import Loadable

Candidate = tuple[tuple[str, int, int], Policy, Budget]  # as a configuration names it, and as it is measured


def columns_and_slashes(vertical: int, slash: int, **more: int) -> Candidate:
    """The vertical-slash candidate of these sizes, as the authors' search estimates it (the 30 nearest forced)."""
    policy = VerticalSlash(vertical=vertical, slash=slash, **{"near": 30, **more})
    return ("vertical_and_slash", vertical, slash), policy, Budget(keys=vertical + slash)


def stream(first: int, recent: int) -> Candidate:
    """The candidate of ``first`` tokens and distances up to ``recent``."""
    return ("stream_llm", first, recent), StreamingLLM(sink=first), Budget(keys=first + recent + 1)


MINFERENCE: tuple[Candidate, ...] = (
    stream(100, 800),
    *(columns_and_slashes(*sizes) for sizes in ((30, 800), (100, 750), (500, 700), (3500, 100))),
    (("block_sparse", 8, 1), BlockSparse(block=32), Budget(share=0.125)),
)


def search_patterns(
    lm: Loadable,
    prompts: Any,
    *,
    candidates: Sequence[Candidate] = MINFERENCE,
    first: int = 2500,
    released: bool = False,
    progress: bool = True,
) -> HeadPatterns:
    """The sparse pattern that keeps most of each head's attention while it reads: MInference's classes, recall form.

    ``search_pattern`` of Jiang et al. 2024 (arXiv 2407.02490; ``minference_forward.py:129-227`` @ fb56c917): a
    candidate's score is the mean over the rows from ``first`` on of the mass that it keeps; the highest is the head's,
    the first of equals. They read one text; several are averaged here. ``HeadPatterns.save`` writes their format.

    Args:
        lm: load_model's result, or what load_model takes.
        prompts: texts, or sequences of token ids, of more than ``first`` tokens.
        candidates: the authors' six.
        first: the first row that counts.
        released: relabel as their code does before it saves: streams become vertical-slash (100, 800), blocks
            vertical-slash (1000, 6096), so that no released configuration has another kind.

    Raises:
        HeadscopeError: no candidate, or as ``lose``.
    """
    if not candidates:
        raise HeadscopeError("give at least one candidate pattern")
    recall: list[np.ndarray] = []
    for _, policy, budget in candidates:
        found = lose(lm, policy, [budget], prompts, at="prefill", first=first, progress=progress)
        recall.append(found.mean()[0, 0])
    names = [_relabelled(name) if released else name for name, _, _ in candidates]
    return best_patterns(np.stack(recall), names)


def best_patterns(
    score: NDArray[np.float64], names: Sequence[tuple[str, int, int]], *, lowest: bool = False
) -> HeadPatterns:
    """Every head's candidate of the highest (or ``lowest``) score (candidate, layer, head), the first of equals; heads
    whose scores are NaN are left out."""
    best = np.where(np.isnan(score), np.inf, score if lowest else -score).argmin(0)
    layers: list[dict[int, SparsePattern]] = []
    for layer, row in enumerate(best.tolist()):
        own = {}
        for head, index in enumerate(row):
            if not np.isnan(score[:, layer, head]).any():
                kind, vertical, slash = names[index]
                own[head] = SparsePattern(kind, vertical, slash, float(score[index, layer, head]))
        layers.append(own)
    return HeadPatterns(tuple(layers))


def _relabelled(pattern: tuple[str, int, int]) -> tuple[str, int, int]:
    sizes = {"stream_llm": (100, 800), "block_sparse": (1000, 6096)}
    return ("vertical_and_slash", *sizes[pattern[0]]) if pattern[0] in sizes else pattern


def retrieval_heads(
    found: CacheLosses, budget: int | str, *, sparsity: float = 0.5, group: int = 1, policy: str = "streaming_llm"
) -> HeadSet:
    """The heads that lose most by streaming: those that DuoAttention would give the whole cache, from a statistic.

    DuoAttention (Xiao et al. 2024, arXiv 2410.10819) trains gates and keeps the key heads whose gate reaches the
    ``sparsity`` quantile full, the others with sinks and recent tokens. Here the loss of recall, 1 - recall, stands in
    for the gate [OURS], the mean over the ``group`` query heads that share a key head (a gate is a key head's). It says
    where mass lies beyond the window, not whether answers need it, which the trained gates are about. The model under
    the split is ``EvictKeys(heads=the others, policy="streaming_llm", budget=320, options={"sink": 64})``.

    Args:
        found: losses of ``policy``.
        budget: one of its budgets.
        sparsity: the share of heads that stream (theirs: 0.5 with grouped heads, 0.75 without).
        group: query heads of a key head.
        policy: as ``found`` calls it.

    Raises:
        HeadscopeError: ``found`` has no such policy or budget.
    """
    if policy not in found.policies or str(budget) not in found.budgets or not 0 <= sparsity < 1:
        raise HeadscopeError(
            f"retrieval heads need losses of {policy} at {budget} and a sparsity from 0 to below 1; these are of "
            f"{', '.join(found.policies)} at {', '.join(found.budgets)}"
        )
    lost = 1.0 - found.mean()[found.policies.index(policy), found.budgets.index(str(budget))]
    return _reaching(lost.reshape(lost.shape[0], -1, group).mean(-1), sparsity, group)


def full_heads(gates: HeadScores, *, sparsity: float = 0.5, group: int = 1, seed: int = 42) -> HeadSet:
    """The heads that keep everything under DuoAttention's gates; all others stream.

    Their rule (``duo_attn/utils.py``, ``sparsify_attention_heads`` @ fe93c314): noise from U(0, 1e-6) on every gate, so
    that ties fall by chance, and full are those that reach the ``sparsity`` quantile. Their draws are numpy's global
    ones; ours come from ``seed``.

    Args:
        gates: one a query head, alike within a group (``from_duo_attention(..., group=)``, or a trained result's).
        sparsity: the share of key heads that stream.
        group: query heads of a key head.

    Raises:
        HeadscopeError: a sparsity outside [0, 1), or query heads of a group that have different gates.
    """
    each = gates.mean.reshape(gates.mean.shape[0], -1, group)
    if not 0 <= sparsity < 1 or not (np.isnan(each) | (each == each[..., :1])).all():
        raise HeadscopeError(f"full heads need a sparsity from 0 to below 1, and one gate for each {group} query heads")
    noise = np.random.default_rng(seed).uniform(0, 1e-6, each.shape[:2])
    return _reaching(each[..., 0] + noise, sparsity, group)


def _reaching(scores: NDArray[np.float64], sparsity: float, group: int) -> HeadSet:
    """The query heads of the key heads (layer, kv_head) that reach the ``sparsity`` quantile, the highest first."""
    shared = scores.repeat(group, axis=1)
    full = shared >= np.nanquantile(scores, sparsity)
    pairs = sorted(zip(*map(np.ndarray.tolist, np.nonzero(full)), strict=True), key=lambda at: (-shared[at], at))
    return HeadSet(tuple(pairs), tuple(float(shared[at]) for at in pairs), name=f"retrieval, {sparsity:.0%} streaming")
