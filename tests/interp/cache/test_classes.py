"""Kinds of heads: the candidate with the highest recall, and the heads that lose most by streaming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.classes import (
    MINFERENCE,
    columns_and_slashes,
    full_heads,
    retrieval_heads,
    search_patterns,
    stream,
)
from headscope.interp.cache.outputs import MINFERENCE_OUTPUT, search_patterns_by_output
from headscope.interp.cache.rows.block_sparse import BlockSparse
from headscope.interp.cache.rows.neighbourhood import gna_mask
from headscope.interp.cache.survey import lose
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.results.cache import MEASURES, CacheLosses
from headscope.interp.results.minference import HeadPatterns
from headscope.interp.results.scores import HeadScores
from headscope.interp.sites import attached
from headscope.interp.survey.tiny import tiny_model
from headscope.kernels.request import Request

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


class Calls(Handler):
    """Keeps every layer's call."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def request(self, call: AttentionCall) -> Request:
        self.calls.append(call)
        return Request()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_candidate_that_changes_fewest_entries(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    """Every output by hand in float64; entries that are nearer to the bound than 1e-6 are in doubt, and none is."""
    monkeypatch.setattr("headscope.interp.cache.rows.vertical_slash.LEAST", (1, 1))
    lm = LanguageModel.wrap(tiny_model("llama"), None, name="tiny", revision="seed")
    candidates = stream(1, 3), columns_and_slashes(6, 6, near=2, first=1, window=8)
    found = search_patterns_by_output(lm, PROMPT, candidates=candidates, above=0.05, scaled=scaled, progress=False)
    handler = Calls()
    with attached(lm, handler), torch.no_grad():
        lm.forward(torch.tensor(PROMPT))
    n = len(PROMPT[0])
    gap = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    kinds = set()
    for call in handler.calls:
        for h in range(lm.info.heads):
            k, v = (x[0, h * x.shape[1] // lm.info.heads].double() for x in (call.key, call.value))
            s = (call.query[0, h].double() @ k.T).masked_fill(gap < 0, -torch.inf)
            seen = (s * (call.scale if scaled else 1.0)).softmax(-1)[-8:]
            columns, slash = seen.sum(0), torch.stack([seen[gap[-8:] == x].sum() for x in range(n)])
            columns[0], slash[:2] = torch.inf, torch.inf
            chosen = torch.isin(torch.arange(n), columns.topk(6).indices) | torch.isin(gap, slash.topk(6).indices)
            z, counts = (s * call.scale).softmax(-1) @ v, []
            for shown in ((gap <= 3) | (torch.arange(n) < 1), chosen):
                off = (z - (s * call.scale).masked_fill(~shown, -torch.inf).softmax(-1) @ v).abs()
                assert ((off - 0.05).abs() > 1e-6).all()
                counts.append(int((off > 0.05).sum()))
            best = found[call.layer, h]
            assert (best.kind, best.vertical, best.slash) == candidates[int(np.argmin(counts))][0]
            assert best.score == min(counts) > 0
            kinds.add(best.kind)
    assert len(kinds) == 2
    listed = [name for name, _, _ in MINFERENCE_OUTPUT]
    assert listed[0] == ("stream_llm", 100, 800) and listed[-1] == ("block_sparse", 10, 1) and len(listed) == 8


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


@pytest.mark.slow
def test_a_real_model_loses_what_its_pattern_has_outside_the_mask(smollm2: LanguageModel) -> None:
    """Neighbourhoods of SmolLM2: tiles of 4 with a window of 8, by the mask of a longer text; and fusion changes P."""
    ids = smollm2.encode("The tide tables for the harbour were printed once a year on a yellow card. " * 3)["input_ids"]
    policies = [
        POLICIES["neighbourhood"](stride=4),
        *(POLICIES["critiprefill"](segment=8, block=4, begin=8, fusion=x) for x in (0.25, 0.0)),
    ]
    found = lose(smollm2, policies, [8], [ids[0].tolist()], at="prefill", progress=False).mean()[:, 0]
    n = ids.shape[1]
    handler = Calls()
    with attached(smollm2, handler), torch.no_grad():
        smollm2.forward(ids)
    mask = gna_mask(4 * n, 8, 4, causal=True)[:n, :n]
    for call in handler.calls:
        wanted = (call.pattern()[0] * mask).sum(-1).mean(-1)
        assert np.abs(found[0, call.layer] - wanted.numpy()).max() < 1e-5
    assert np.array_equal(found[1, :2], found[2, :2]) and (found[1, 0] > 1 - 1e-5).all()
    assert not np.array_equal(found[1, 2:], found[2, 2:])
