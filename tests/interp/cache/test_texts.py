"""LADM against its loop, written out over the untouched model's own attention in float64.

Scores of at most 30 in float32 are off by some 3 rounding units of their size, 1e-5, and weights by that share of
theirs: a PFS, the mass of ``chunk`` queries on some keys, by at most 1e-5 * chunk, and an AFS or CDS, of such numbers
weighed by shares below 1 and a deviation of about 1, by as much.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from headscope.interp.cache.texts import LADM, long_context_scores, long_context_spans
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.survey.tiny import tiny_model

SMALL = LADM(chunk=4, d_afs=2, d_cds=3, keep=5)
NEAR = 1e-5 * SMALL.chunk
TEXTS = [[(7 * i * i + 3 * i) % 60 + 2 for i in range(70)], [(i * i) % 50 + 3 for i in range(61)]]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Two query heads a key head, and weights wide enough that attention is far from uniform."""
    model = tiny_model("llama")
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.normal_(0, 0.3)
    return LanguageModel.wrap(model, None, name="tiny", revision="seed")


def eager(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """(layer, head, query, key) in float64."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions, 1)[0].numpy()


def loop(A: np.ndarray, s: LADM) -> tuple[float, dict[int, list[float]]]:
    """The authors' loop over one text: its score, and the last layer's PFS of every span."""
    T, interval = A.shape[-1], s.chunk * s.d_afs
    layers, last = [], {}
    for layer in A:
        scores = []
        for start in range(T - s.chunk, s.keep + 4 * interval, -s.chunk * s.d_cds):
            rows = layer[:, start : start + s.chunk, :start]
            w = (rows / rows.sum(-1, keepdims=True)).sum(1).mean(0)
            pfs, total, m = [], 0.0, 1
            while start - m * interval >= s.keep:
                at = start - m * interval
                pfs.append(float(w[at : at + s.chunk].sum()))
                total += pfs[-1] * (m * interval / T if s.length_weight else 1.0)
                m += 1
            scores.append(total * (start / T if s.length_weight else 1.0) * (np.std(pfs, ddof=1) if s.spread else 1.0))
            last[start] = pfs
        layers.append(np.mean(scores))
    return float(np.mean(layers)), last


@pytest.mark.parametrize("changes", [{}, {"spread": False}, {"length_weight": False}])
def test_scores_are_those_of_the_loop(lm: LanguageModel, changes: dict) -> None:
    settings = LADM(**{**vars(SMALL), **changes})
    wanted = [loop(eager(lm, ids), settings)[0] for ids in TEXTS]
    found = long_context_scores(lm, TEXTS, settings, progress=False)
    assert found["cds"].is_monotonic_decreasing
    found = found.sort_values("text")
    np.testing.assert_allclose(found["cds"], wanted, rtol=0, atol=NEAR)
    assert abs(wanted[0] - wanted[1]) > 1e-3 * max(wanted)
    assert found["tokens"].tolist() == [70, 61] and found["spans"].tolist() == [3, 2]
    other = [loop(eager(lm, ids), LADM(**{**vars(settings), "keep": 9}))[0] for ids in TEXTS]
    assert max(abs(np.array(other) - wanted)) > 1e-3 * max(wanted), "a key more or less would show"


def test_spans_say_where_the_score_comes_from(lm: LanguageModel) -> None:
    found = long_context_spans(lm, TEXTS[0], SMALL)
    score, last = loop(eager(lm, TEXTS[0]), SMALL)
    assert found["span"].values.tolist() == list(last) and found["distance"].values[:3].tolist() == [8, 16, 24]
    assert float(found["cds"].mean()) == pytest.approx(score, abs=NEAR)
    for start, pfs in last.items():
        own = found["pfs"].isel(layer=-1).sel(span=start).values
        np.testing.assert_allclose(own[: len(pfs)], pfs, rtol=0, atol=NEAR)
        assert np.isnan(own[len(pfs) :]).all()
    np.testing.assert_allclose(found["cds"], found["afs"].mean("span"), rtol=1e-12)


def test_uniform_attention_has_no_spread(lm: LanguageModel) -> None:
    """Every earlier span of as many keys then has the same mass, chunk * chunk / start, whose deviation is 0."""
    flat = LanguageModel.wrap(copy.deepcopy(lm.model), None, name="flat", revision="seed")
    with torch.no_grad():
        for layer in flat.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = long_context_spans(flat, TEXTS[0], SMALL)
    mass = SMALL.chunk**2 / found["span"]
    assert float(abs(found["pfs"] - mass).max()) < NEAR
    assert float(abs(found["cds"]).max()) < NEAR
    even = long_context_spans(flat, TEXTS[0], LADM(**{**vars(SMALL), "spread": False}))
    far = (found["distance"] / 70 * mass).where(found["pfs"].isel(layer=0).notnull()).sum("distance")
    np.testing.assert_allclose(even["afs"].isel(layer=0), far * found["span"] / 70, rtol=1e-5)


def test_a_killed_run_goes_on(lm: LanguageModel, tmp_path: Path) -> None:
    first = long_context_scores(lm, TEXTS, SMALL, out=tmp_path, progress=False)
    kept = tmp_path / "ladm.trials.jsonl"
    kept.write_text("\n".join(kept.read_text().splitlines()[:-1]) + "\n")
    assert long_context_scores(lm, TEXTS, SMALL, out=tmp_path, progress=False).equals(first)
    with pytest.raises(HeadscopeError, match="other settings"):
        long_context_scores(lm, TEXTS, LADM(chunk=5, d_afs=2, d_cds=3, keep=5), out=tmp_path, progress=False)


def test_what_cannot_be_scored_gets_one_line(lm: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="needs 2305 with spans of 128"):
        long_context_scores(lm, TEXTS, progress=False)
    assert long_context_scores(lm, [TEXTS[0][:42]], SMALL, progress=False)["spans"].tolist() == [1]
    with pytest.raises(HeadscopeError, match="has 41 tokens, and LADM needs 42"):
        long_context_spans(lm, TEXTS[0][:41], SMALL)
    with pytest.raises(HeadscopeError, match="from 1 on"):
        LADM(chunk=0)
