"""Kinds of heads: the candidate with the highest recall, and the heads that lose most by streaming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.classes import (
    MINFERENCE,
    columns_and_slashes,
    full_heads,
    retrieval_heads,
    search_patterns,
    stream,
)
from headscope.interp.cache.rows.block_sparse import BlockSparse
from headscope.interp.cache.survey import lose
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.results.cache import MEASURES, CacheLosses
from headscope.interp.results.minference import HeadPatterns
from headscope.interp.results.scores import HeadScores
from headscope.interp.survey.tiny import tiny_model

PROMPT = [list(range(5, 45))]


def test_the_candidate_with_the_highest_recall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("headscope.interp.cache.rows.vertical_slash.LEAST", (1, 1))
    lm = LanguageModel.wrap(tiny_model("llama"), None, name="tiny", revision="seed")
    candidates = (
        stream(1, 6),
        columns_and_slashes(4, 3, near=2, first=1, window=8),
        (("block_sparse", 8, 1), BlockSparse(block=4), Budget(share=0.25)),
    )
    found = search_patterns(lm, PROMPT, candidates=candidates, first=10, progress=False)
    each = [
        lose(lm, policy, [budget], PROMPT, at="prefill", first=10, progress=False).mean()[0, 0]
        for _, policy, budget in candidates
    ]
    for (layer, head), pattern in found.items():
        best = int(np.argmax([one[layer, head] for one in each]))
        assert (pattern.kind, pattern.vertical, pattern.slash) == candidates[best][0]
        assert pattern.score == max(one[layer, head] for one in each)
    assert len(found) == lm.info.layers * lm.info.heads and len({one.kind for one in found.values()}) > 1
    saved = search_patterns(lm, PROMPT, candidates=candidates, first=10, released=True, progress=False)
    assert {one.kind for one in saved.values()} == {"vertical_and_slash"}
    assert [name for name, _, _ in MINFERENCE][1:] == [
        *(("vertical_and_slash", v, s) for v, s in ((30, 800), (100, 750), (500, 700), (3500, 100))),
        ("block_sparse", 8, 1),
    ]
    assert isinstance(found, HeadPatterns)
    with pytest.raises(HeadscopeError, match="at least one candidate"):
        search_patterns(lm, PROMPT, candidates=())


def test_heads_that_lose_most_by_streaming() -> None:
    recall = np.array([[0.875, 0.625, 0.5, 0.25], [1.0, 1.0, 0.75, 0.75]])[None, None, None]
    values = {name: recall for name in MEASURES}
    found = CacheLosses(("streaming_llm",), ("320",), values, np.ones((1, 1, 1, 1)))
    heads = retrieval_heads(found, 320, group=2)  # key heads lose 0.25, 0.625, 0 and 0.25, of which the median is 0.25
    assert list(heads) == [(0, 2), (0, 3), (0, 0), (0, 1), (1, 2), (1, 3)]
    assert heads.weights == (0.625, 0.625, 0.25, 0.25, 0.25, 0.25)
    assert list(retrieval_heads(found, 320, sparsity=0.75)) == [(0, 3), (0, 2)]
    with pytest.raises(HeadscopeError, match="these are of streaming_llm at 320"):
        retrieval_heads(found, 64)


def test_gates_are_split_by_their_quantile_and_ties_by_chance() -> None:
    """Key heads, two query heads each; the median of gates that differ by more than the noise is the formula's."""
    gates = np.array([[0.9, 0.2, 0.6], [0.1, 0.8, 0.4]])
    scores = HeadScores("duo_attention", gates.repeat(2, axis=1)[None])
    full = gates >= np.quantile(gates, 0.5)
    found = full_heads(scores, group=2)
    assert set(found) == {(i, 2 * g + n) for i, g in np.argwhere(full).tolist() for n in range(2)}
    assert found[0] == (0, 0) and abs(found.weights[0] - 0.9) < 2e-6
    alike = HeadScores("duo_attention", np.ones((1, 4, 8)))
    halves = [set(full_heads(alike, group=2, seed=seed)) for seed in (1, 2, 1)]
    assert len(halves[0]) == 16 and halves[0] == halves[2] != halves[1]
    with pytest.raises(HeadscopeError, match="one gate for each 3 query heads"):
        full_heads(scores, group=3)
