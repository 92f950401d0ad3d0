"""Statistics of keys, the user's own among them, and several statistics of one class in one trace."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.records.labels import own
from headscope.interp.records.record import concatenate, load_record, save_record
from headscope.interp.statistics import (
    BlockMap,
    CallStatistic,
    Entropy,
    HeadOutput,
    KeyMass,
    KeyStatistic,
    MaxLogit,
    SinkMass,
    Statistic,
    TargetMass,
    TopBlocks,
    TopKeys,
)
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace

NEAR = 1e-4  # of sums over some 20 weights of a float32 model against a float64 one: scores there differ by 1e-6


def ids_of(batch=1, length=20):
    return torch.randint(4, 100, (batch, length), generator=torch.Generator().manual_seed(3))


def eager(model, ids, **inputs):
    """The model's own weights: (example, layer, head, query, key); in float64 where its experts can."""
    dense = copy.deepcopy(model)
    dense = dense if dense.config.model_type == "gpt_oss" else dense.double()
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        found = dense(ids, output_attentions=True, use_cache=False, **inputs).attentions
    return torch.stack(found, 1).numpy()


def recorded(model, ids, statistics, **inputs):
    with trace(model, statistics) as tracer:
        model(ids, use_cache=False, **inputs)
    return tracer.record


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_every_key_mass_has_its_own_queries(kind):
    """Grouped heads, softcap, sink logits and windows: a range, another, and all queries in one trace."""
    model, ids = tiny_model(kind), ids_of(2, 30)
    asked = [
        KeyMass(),
        KeyMass("mean", queries=(10, 20)),
        KeyMass("max", (3, 90)),
        KeyMass(queries=(10, 20), label="b"),
    ]
    record, p = recorded(model, ids, asked), eager(model, ids)
    seen = (np.cumsum(p[..., ::-1, :] > 0, -2)[..., ::-1, :] > 0) & (p > 0)
    counts = np.maximum(seen[..., 10:20, :].sum(-2), 1)
    wanted = {
        "key_mass": p.sum(-2),
        "key_mass_mean": p[..., 10:20, :].sum(-2) / counts,
        "key_mass_max": p[..., 3:, :].max(-2),
        "b.key_mass": p[..., 10:20, :].sum(-2),
    }
    for name, want in wanted.items():
        assert np.abs(record[name].to_numpy() - want).max() < NEAR, name
    assert np.abs(wanted["key_mass"] - wanted["b.key_mass"]).max() > 1


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_every_example_may_have_its_own_queries(reduce):
    model, ids, ranges = tiny_model("llama"), ids_of(2), [(4, 9), (11, 20)]
    name = KeyMass(reduce).variables[0]
    record, p = recorded(model, ids, [KeyMass(reduce, ranges)]), eager(model, ids)
    for b, (first, stop) in enumerate(ranges):
        rows = p[b, ..., first:stop, :]
        sees = np.maximum((np.arange(first, stop)[:, None] >= np.arange(20)).sum(0), 1)
        want = {"sum": rows.sum(-2), "mean": rows.sum(-2) / sees, "max": rows.max(-2)}[reduce]
        assert np.abs(record[name].to_numpy()[b] - want).max() < NEAR
    with pytest.raises(HeadscopeError, match="given for 3 examples, but the batch has 2"):
        recorded(model, ids, [KeyMass(queries=[(0, 1)] * 3)])
    with pytest.raises(HeadscopeError, match="one such pair an example"):
        KeyMass(queries=[(0, 1), (3, 2)])


def test_key_masses_with_padding_and_over_passes():
    model, ids, mask = tiny_model("llama"), ids_of(2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    asked = [KeyMass(), KeyMass("mean"), KeyMass("max", label="far")]
    record = recorded(model, ids, asked, attention_mask=mask, position_ids=positions)
    cache = DynamicCache()
    with trace(model, asked) as chunked:
        for first, stop in ((0, 9), (9, 19), (19, 20)):
            model(
                ids[:, first:stop],
                past_key_values=cache,
                attention_mask=mask[:, :stop],
                position_ids=positions[:, first:stop],
            )
    for b, start in ((0, 6), (1, 0)):
        p = eager(model, ids[b : b + 1, start:])[0]
        wanted = p.sum(-2), p.sum(-2) / np.arange(20 - start, 0, -1), p.max(-2)
        for found in (record, chunked.record):
            for name, want in zip(("key_mass", "key_mass_mean", "far.key_mass_max"), wanted, strict=True):
                got = found[name].to_numpy()[b]
                assert np.abs(got[..., : 20 - start] - want).max() < NEAR and np.isnan(got[..., 20 - start :]).all()


def test_a_range_of_no_rows_is_refused_or_empty():
    with pytest.raises(HeadscopeError, match="queries=\\(first, stop\\)"):
        KeyMass(queries=(5, 5))
    with pytest.raises(HeadscopeError, match="queries=\\(first, stop\\)"):
        KeyMass(queries=(-3, 5))
    record = recorded(tiny_model("llama"), ids_of(), [KeyMass(queries=(30, 40)), KeyMass(label="all")])
    assert (record["key_mass"] == 0).all() and float(record["all.key_mass"].sum()) > 1


@dataclass(frozen=True)
class Peak(KeyStatistic):
    """The square of the largest weight of a key, and how many queries looked at it."""

    name: ClassVar[str] = "peak_square"
    empty: ClassVar[float] = -1.0

    @property
    def variables(self):
        return ("peak_square", "looked")

    def ask(self, plan):
        place = plan.columns(max=True, count=True)

        def read(reduced):
            return {"peak": reduced.columns[place].max, "count": reduced.columns[place].count.double()}

        return read

    def merge(self, part, held, value):
        return torch.maximum(held, value) if part == "peak" else held.clamp(min=0) + value.clamp(min=0)

    def finish(self, parts):
        return {"peak_square": parts["peak"].square(), "looked": parts["count"]}


@dataclass(frozen=True)
class ByParity(KeyStatistic, CallStatistic):
    """Of each key, what even and odd queries give it, from the call itself."""

    name: ClassVar[str] = "by_parity"

    @property
    def coordinates(self):
        return {"parity": ["even", "odd"]}

    def measure(self, call, reduced, rows):
        p = call.pattern()
        odd = (torch.arange(p.shape[2]) + call.mask.query_offset) % 2 == 1
        return {"by_parity": torch.stack([p[:, :, ~odd].sum(2), p[:, :, odd].sum(2)], -1)}


def test_a_key_statistic_of_ones_own_is_merged_and_finished():
    model, ids, cache = tiny_model("llama"), ids_of(2), DynamicCache()
    asked = [Peak(), ByParity(), ByParity(label="again"), KeyMass("max")]
    with trace(model, asked) as tracer:
        for first, stop in ((0, 11), (11, 20)):
            model(ids[:, first:stop], past_key_values=cache)
    record, p = tracer.record, eager(model, ids)
    assert np.abs(record["peak_square"] - p.max(-2) ** 2).max() < NEAR
    assert np.abs(record["key_mass_max"] - p.max(-2)).max() < NEAR
    assert (record["looked"][1, 1, 2] == np.arange(20, 0, -1)).all()
    for name, dim in (("by_parity", "parity"), ("again.by_parity", "again.parity")):
        assert record[name].dims[-1] == dim and record[dim].to_numpy().tolist() == ["even", "odd"]
        for n in (0, 1):
            assert np.abs(record[name][..., n] - p[..., n::2, :].sum(-2)).max() < NEAR


def test_a_statistic_of_keys_says_how_it_is_merged():
    @dataclass(frozen=True)
    class Bare(Statistic):
        name: ClassVar[str] = "bare"
        kind: ClassVar[str] = "key"

    with pytest.raises(HeadscopeError, match="Bare has values of keys; make it a KeyStatistic"):
        with trace(tiny_model("llama"), [Bare()]):
            raise AssertionError("the block must not be entered")


LABELLED = [
    SinkMass(1),
    SinkMass(3, label="three"),
    TargetMass({"previous": lambda q: q - 1}),
    TargetMass({"second": lambda q: q - 2, "self": lambda q: q}, label="three"),
    TopKeys(1),
    TopKeys(3, label="three"),
    HeadOutput((-1,)),
    HeadOutput((0, 4), label="three"),
    BlockMap(8),
    BlockMap(4, label="three"),
    TopBlocks(8, k=1),
    TopBlocks(4, k=2, label="three"),
    KeyMass(),
    KeyMass(queries=(2, 5), label="three"),
]


def test_two_of_a_class_share_one_pass_and_are_what_each_gives_alone(monkeypatch, tmp_path):
    model, ids, calls = tiny_model("llama"), ids_of(2), []
    attend = AttentionCall.attend
    monkeypatch.setattr(AttentionCall, "attend", lambda call, request: calls.append(call) or attend(call, request))
    with trace(model, [s for s in LABELLED if not isinstance(s, TopBlocks)]) as tracer:
        before = len(calls)
        model(ids, use_cache=False)
    assert len(calls) - before == tracer.record.sizes["layer"]
    longer = torch.cat([ids, ids_of(2, 7)], 1)
    parts = [recorded(model, x, LABELLED) for x in (ids, longer)]
    save_record(concatenate(parts), tmp_path / "record")
    record = load_record(tmp_path / "record").isel(example=slice(0, 2))
    plain = recorded(model, ids, LABELLED[::2])
    other = recorded(model, ids, [type(s)(**{**vars(s), "label": None}) for s in LABELLED[1::2]])
    for found, alone in ((record, plain), (own(record, "three"), other)):
        for name in set(alone.data_vars) - {"token"}:
            assert found[name].dims == alone[name].dims
            got = found[name].isel({dim: slice(0, n) for dim, n in alone[name].sizes.items()})
            np.testing.assert_allclose(got.to_numpy(), alone[name].to_numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
            assert all(got[dim].to_numpy().tolist() == alone[dim].to_numpy().tolist() for dim in alone[name].coords)
    assert set(own(record, "three").data_vars) == set(other.data_vars) - {"token"}


def test_labels_are_asked_for_by_name():
    model = tiny_model("llama")
    with pytest.raises(HeadscopeError, match="same variable: sink_mass; give one of them a label"):
        with trace(model, [SinkMass(1), SinkMass(2)]):
            raise AssertionError("the block must not be entered")
    with pytest.raises(HeadscopeError, match="label"):
        with trace(model, [SinkMass(1, label="a"), SinkMass(2, label="a")]):
            raise AssertionError("the block must not be entered")
    for wrong in ("", "a.b", "a/b", "a b"):
        with pytest.raises(HeadscopeError, match="labels no statistic"):
            with trace(model, [SinkMass(label=wrong)]):
                raise AssertionError("the block must not be entered")
    record = recorded(model, ids_of(), [SinkMass(1, label="a"), Entropy()])
    with pytest.raises(HeadscopeError, match="nothing in this record is labelled 'b'; its labels are a"):
        own(record, "b")
    with pytest.raises(HeadscopeError, match="traced without labels"):
        own(record[["entropy"]], "a")


def test_a_label_shows_only_where_there_is_one():
    assert repr(SinkMass(2)) == "SinkMass(first=2)" and repr(Entropy()) == "Entropy()"
    assert repr(SinkMass(2, label="far")) == "SinkMass(first=2, label='far')"
    assert SinkMass(2, label="far") != SinkMass(2)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "t5"])
def test_the_largest_logit_is_the_largest_score(kind):
    """As the model's own code hands it to softmax, softcap and position bias included."""
    model, ids = tiny_model(kind, "encoder-decoder" if kind == "t5" else "causal-lm"), ids_of()
    inputs = {"decoder_input_ids": ids} if kind == "t5" else {}
    with trace(model, [MaxLogit(), TopKeys()], tower="decoder" if kind == "t5" else None) as tracer:
        model(ids, use_cache=False, **inputs)
    scores, attend = [], torch.nn.functional.softmax

    def softmax(x, *args, **options):
        scores.append(x.detach())
        return attend(x, *args, **options)

    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "softmax", softmax)
        patch.setattr(torch, "softmax", softmax)
        dense(ids, use_cache=False, **inputs)
    scores = [s for s in scores if s.dim() == 4 and s.shape[-2] == 20]
    if kind == "t5":  # encoder, then the decoder's own and across, layer by layer
        scores = scores[-2 * tracer.record.sizes["layer"] :: 2]
    for layer, found in enumerate(tracer.record["max_logit"][0].to_numpy()):
        assert np.abs(found - scores[layer][0, ..., :20].amax(-1).numpy()).max() < NEAR
