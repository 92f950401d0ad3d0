"""Exemplars: against sorting all prompts by eager attention in float64; what is kept, drawn and shown.

BOUND is that of ``test_sweeps``: two layers of a tiny model in float32.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack
from headscope.interp.reports.page import Report
from headscope.interp.statistics import Entropy, KeyMass, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.sweeps import sweep
from headscope.interp.sweeps.exemplar_page import page
from headscope.interp.sweeps.exemplars import Decile, Exemplar, Exemplars, HeadExemplars, _Kept, exemplars

BOUND = 4e-5
HEADS = [(1, 2), (0, 0)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.wrap(tiny_model("llama"))


@pytest.fixture(scope="module")
def given() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(4, 100, draw.integers(3, 40)).tolist() for _ in range(33)]


def spell(ids: list[int]) -> list[str]:
    return [f"<t{i}>" for i in ids]


def entropies(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """(layer, head, query) from the untouched model's eager weights in float64."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions, 1)[0]
    return -(p * p.clamp(min=1e-300).log()).sum(-1).numpy()


@pytest.mark.parametrize("per", ["max", "mean"])
def test_they_are_those_of_all_prompts_sorted_by_eager_attention(lm, given, tmp_path, per) -> None:
    sweep(lm, given, [Entropy()], out=tmp_path, largest=4, progress=False)
    found = exemplars(tmp_path, "entropy", HEADS, spell, per=per, top=3, each=2, window=8)
    dense = [entropies(lm, ids) for ids in given]
    assert (found.prompts, found.ranked) == (33, 33)
    for (layer, head), one in zip(HEADS, found.heads, strict=True):
        assert (one.layer, one.head) == (layer, head)
        scores = np.array([getattr(x[layer, head], per)() for x in dense])
        order = np.argsort(-scores)
        assert np.diff(np.sort(scores)).min() > 2 * BOUND  # so that rounding turns no place
        assert [x.example for x in one.top] == order[:3].tolist()
        assert len(one.deciles) == 10
        for decile, members in zip(one.deciles, np.array_split(order[::-1], 10), strict=True):
            assert decile.prompts == len(members) and {x.example for x in decile.exemplars} < {*members.tolist()}
            assert len(decile.exemplars) == 2
            ends = scores[members[0]], scores[members[-1]]
            np.testing.assert_allclose([decile.low, decile.high], ends, rtol=0, atol=BOUND)
        for x in [*one.top, *(x for decile in one.deciles for x in decile.exemplars)]:
            ids, values = given[x.example], dense[x.example][layer, head]
            cut = slice(x.start, x.start + 8)
            assert x.tokens == spell(ids[cut]) and x.length == len(ids) and len(x.tokens) == min(8, len(ids))
            assert x.score == pytest.approx(scores[x.example], abs=BOUND)
            np.testing.assert_allclose(x.values, values[cut], rtol=0, atol=BOUND)
            assert max(x.values) == pytest.approx(values.max(), abs=BOUND)


def test_batches_change_nothing_and_neither_does_the_layer_alone(lm, given, tmp_path) -> None:
    shown = []
    for largest, layers in ((1, None), (64, [1])):
        out = tmp_path / str(largest)
        sweep(lm, given, [Entropy()], out=out, largest=largest, layers=layers, progress=False)
        found = exemplars(out, "entropy", [(1, 2)], spell, sample=20, each=1).heads[0]
        shown.append([[x.example for x in found.top], [[x.example for x in d.exemplars] for d in found.deciles]])
    assert shown[0] == shown[1]


def test_what_is_kept_does_not_grow_with_the_data_set() -> None:
    """20,000 prompts in chunks: the best of all, and deciles from a sample whose ranks are within four standard
    errors (0.5 / sqrt(2,000)) of the prompts'."""
    scores = np.random.default_rng(1).random((20_000, 2))
    kept, other = (_Kept(2, top=5, sample=2_000, seed=3) for _ in range(2))
    for first in range(0, 20_000, 500):
        numbers = np.arange(first, first + 500)
        kept.add(numbers, scores[numbers])
        assert kept.scores.shape[0] <= 2_000 and all(len(best) <= 5 for best in kept.best)
    for numbers in np.array_split(np.random.default_rng(2).permutation(20_000), 7):
        other.add(numbers, scores[numbers])
    for at in range(2):
        best, tenths = kept.of_head(at, each=4)
        again, drawn = other.of_head(at, each=4)
        assert best == again == np.argsort(-scores[:, at])[:5].tolist()
        assert [numbers for _, numbers in tenths] == [numbers for _, numbers in drawn]
        edges = [float(values[-1]) for values, _ in tenths[:-1]]  # of uniform scores, ranks are the scores
        np.testing.assert_allclose(edges, np.arange(0.1, 0.95, 0.1), rtol=0, atol=4 * 0.5 / np.sqrt(2_000))
    assert kept.count == 20_000 and _Kept(1, 1, 3, seed=0).of_head(0, 1)[0] == []
    assert other.numbers.tolist() == kept.numbers.tolist() != np.sort(kept.numbers).tolist()


def test_few_prompts_fill_few_deciles(lm, tmp_path) -> None:
    sweep(lm, [[5, 6, 7], [8, 9, 10, 11]], [Entropy()], out=tmp_path, progress=False)
    one = exemplars(tmp_path, "entropy", [(0, 1)], spell).heads[0]
    assert len(one.top) == 2 and sum(decile.prompts for decile in one.deciles) == 2 and len(one.deciles) == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"variable": "key_mass"}, "no statistic of this record with one number a query; it has entropy, sink_mass"),
        ({"heads": [(0, 2)]}, "L0H2 is not in this record, of layers 1 with 4 heads"),
        ({"heads": [(1, 4)]}, "L1H4 is not in this record"),
        ({"top": 0}, "at least 1"),
        ({"per": "sum"}, "per is 'max' or 'mean'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(lm, tmp_path, asked, says) -> None:
    sweep(lm, [[5, 6, 7]], [Entropy(), SinkMass(), KeyMass()], out=tmp_path, layers=[1], progress=False)
    given = {"variable": "entropy", "heads": [(1, 2)], **asked}
    with pytest.raises(HeadscopeError, match=says):
        exemplars(tmp_path, spell=spell, **given)


def test_the_page_escapes_tokens_and_marks_them_by_value(tmp_path) -> None:
    one = Exemplar(7, 2.0, 3, 9, ["<script>x()</script>", "Ġand", "x"], [2.0, 1.0, None])
    head = HeadExemplars(3, 1, [one], [Decile(10, 1.5, 2.0, 4, [one])])
    found = Exemplars("entropy", "max", 40, 40, [head], {"data": "<i>"})
    html = page(found, "a <b>model").save(tmp_path / "page.html").read_text()
    assert "<script>x" not in html and "&lt;script&gt;x()&lt;/script&gt;" in html and "<b>model" not in html
    assert '<span style="background:rgba(31,111,139,0.85)" title="2">' in html  # the largest
    assert '<span style="background:rgba(31,111,139,0.00)" title="1">·and</span><span>x</span>' in html
    assert "tokens 3 to 5 of 9" in html and "Decile 10 (1.5 to 2, 4 prompts)" in html and "nats" in html
    document = json.loads(found.save(tmp_path / "found.json").read_text())
    assert document["kind"] == "headscope exemplars" and document["heads"][0]["top"][0]["values"] == [2.0, 1.0, None]
    with pytest.raises(HeadscopeError, match="2 tokens have 1 values"):
        Report("x").tokens(["a", "b"], [1.0], "y", low=0, high=1)


@pytest.mark.slow
def test_smollm2_exemplars_are_those_of_eager_weights(smollm2, tmp_path) -> None:
    """Entropy of a real head in float32: 1e-4 nats, six times the largest difference that the README reports."""
    words = load_haystack().split()
    texts = [" ".join(words[200 * i : 200 * i + 20 + i]) for i in range(12)]
    sweep(smollm2, texts, [Entropy()], out=tmp_path, layers=[5], progress=False)
    top = exemplars(tmp_path, "entropy", [(5, 3)], smollm2.tokenizer.convert_ids_to_tokens, per="mean").heads[0].top
    before, scores = smollm2.model.config._attn_implementation, []
    smollm2.model.set_attn_implementation("eager")
    try:
        for text in texts:
            with torch.no_grad():
                p = smollm2.model(**smollm2.encode(text), output_attentions=True).attentions[5][0, 3].double()
            scores.append(float(-(p * p.clamp(min=1e-300).log()).sum(-1).mean()))
    finally:
        smollm2.model.set_attn_implementation(before)
    assert [x.example for x in top] == np.argsort(scores)[::-1][:10].tolist()
    np.testing.assert_allclose([x.score for x in top], sorted(scores)[::-1][:10], rtol=0, atol=1e-4)


def test_a_record_without_prompts_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headscope.interp.sweeps.exemplars.each_part", lambda record: iter(()))
    with pytest.raises(HeadscopeError, match="runs/none holds no prompts, so there is nothing to rank"):
        exemplars("runs/none", "entropy", "L0H0", lambda ids: [str(i) for i in ids])
