"""Decoding steps as graphs, with a stand-in for CUDA graphs that does torch's operations again."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.sites import attached, verify
from headscope.interp.statistics import Distance, Entropy, KeyMass, SpanMass, TargetMass, TopKeys, WindowMass
from headscope.interp.statistics.queries import Generated
from headscope.interp.statistics.spans import OPEN
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing import step_graphs
from headscope.interp.tracing.step import Step
from tests.interp.tracing.recorded_graphs import (
    NEW,
    STATISTICS,
    At,
    Graphs,
    check_alike,
    generate,
    padded,
    python_alone,
)


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def plainly(model, statistics, monkeypatch, times: int = 1, **options):
    """The record without graphs."""
    with python_alone(monkeypatch), trace(model, statistics, **options) as tracer:
        for _ in range(times):
            generate(model)
    return tracer.record


@pytest.mark.parametrize("options", [{}, {"queries": Generated()}], ids=["all", "generated"])
def test_replayed_steps_leave_the_record_and_the_text_of_python(graphs, monkeypatch, options):
    model = tiny_model("llama")
    untraced, spans = generate(model), {"begin": (1, 4), "later": [[(2, 3), (18, 21)]], "rest": (17, OPEN)}
    statistics = [*STATISTICS, TopKeys(k=2), SpanMass(spans)]
    expected = plainly(model, statistics, monkeypatch, times=2, **options)
    assert graphs.replays == 0
    with trace(model, statistics, **options) as tracer:
        texts = [generate(model), generate(model)]
    assert all(torch.equal(text, untraced) for text in texts)
    # of the nine steps of a text one comes first, and two run both ways
    assert graphs.captures == 2 and graphs.replays == 2 * (NEW - 2)
    check_alike(tracer.record, expected)


def test_replayed_steps_are_what_eager_weights_of_an_untouched_model_say(graphs):
    model, (_, mask) = tiny_model("llama"), padded()
    with trace(model, STATISTICS[1:]) as tracer:
        text = generate(model)
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    seen = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long)], 1)
    with torch.no_grad():
        maps = torch.stack(eager(text, attention_mask=seen, output_attentions=True).attentions, 1).double()
    for example, start in enumerate((5, 0)):
        p, record = maps[example, :, :, start:-1, start:-1], tracer.record.isel(example=example)
        assert graphs.replays == NEW - 2 and int(record["length"]) == p.shape[2] == 21 - start
        # float32: 2^-24 a rounding, of sums of 21 weights and terms below log 21, both sides: below 21 x 3 x 2 x 2^-24
        for name, right in (("entropy", torch.special.entr(p).sum(-1)), ("sink_mass", p[..., :2].sum(-1))):
            got = torch.tensor(record[name].to_numpy())[..., : p.shape[2]]
            assert float((got - right).abs().max()) < 8e-6, name


def test_layers_that_are_not_read_keep_their_own_attention_in_the_graph(graphs, monkeypatch):
    for attention in ("sdpa", "eager"):
        model = tiny_model("llama")
        model.set_attn_implementation(attention)
        expected, before = plainly(model, STATISTICS, monkeypatch, layers=[1]), graphs.replays
        with trace(model, STATISTICS, layers=[1]) as tracer:
            generate(model)
        assert graphs.replays - before == NEW - 2
        check_alike(tracer.record, expected)


LATER = TargetMass({"later": lambda at: torch.where(at > 16, 3, 0)})  # the same key at the positions that are checked


@pytest.mark.parametrize("statistic", [Distance(), WindowMass(window=4), LATER])
def test_what_depends_on_the_position_is_left_to_python(graphs, monkeypatch, statistic):
    model = tiny_model("llama")
    expected = plainly(model, [statistic], monkeypatch)
    with trace(model, [statistic]) as tracer:
        generate(model)
    assert graphs.captures == 0
    check_alike(tracer.record, expected)
    monkeypatch.setattr(type(statistic), "at_any_position", True)  # were that wrong of it
    with trace(model, [statistic]) as tracer:
        generate(model)
    assert tracer.record.equals(expected) == (graphs.replays == step_graphs.CHECKS) == (statistic is not LATER)


@pytest.mark.parametrize("what", ["stale", "fails", "spoils", "writes nothing", "does not count"])
def test_a_graph_that_does_not_hold_is_not_used(graphs, monkeypatch, what):
    def spoil(found):
        if what == "fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        if what == "spoils":
            found[0].past_key_values.layers[0].keys[:, :, 13].fill_(7.0)  # of the step that is held to Python's
            found[0].logits.add_(1.0)
        if what == "does not count":
            found[0].past_key_values.layers[1].cumulative_length.sub_(1)
        if what == "stale":
            held.setdefault("first", found[0].logits.clone())
            found[0].logits.copy_(held["first"])

    model, held = tiny_model("llama"), {}
    untraced = generate(model)
    expected = plainly(model, STATISTICS, monkeypatch)
    graphs.spoil, graphs.without = spoil, "index_copy_" if what == "writes nothing" else ""
    with trace(model, STATISTICS) as tracer:
        assert torch.equal(generate(model), untraced)
    assert 0 < graphs.replays <= step_graphs.CHECKS
    check_alike(tracer.record, expected)


def test_who_watches_or_changes_a_pass_is_called_in_every_step(graphs):
    model, calls = tiny_model("llama"), []
    verify(model)
    mlp = model.model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda *_: calls.append(1))
    with trace(model, STATISTICS):
        generate(model)
    hook.remove()
    assert len(calls) == NEW and graphs.captures == 0

    class Counting(Handler):
        def edit(self, call):
            calls.append(call.layer)
            return call

    calls.clear()
    with trace(model, STATISTICS), attached(model, Counting()):
        generate(model)
    assert calls.count(0) == NEW and graphs.captures == 0

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **kwargs or {})

    counts = []
    for traced in (contextlib.nullcontext(), trace(model, STATISTICS)):
        calls.clear()
        with traced, Operations():
            generate(model)
        counts.append(calls.count(torch.ops.aten.silu.default))
    assert graphs.captures == 0 and counts == [2 * NEW, 2 * NEW]

    calls.clear()
    late = At(7, lambda: mlp.register_forward_hook(lambda *_: calls.append(1)))  # six steps are over
    with trace(model, STATISTICS):
        generate(model, criterion=late)
    assert len(calls) == NEW - 7 and graphs.replays == 5


@pytest.mark.parametrize(("architecture", "statistics"), [("mistral", STATISTICS), ("llama", [Entropy(), KeyMass()])])
def test_windows_and_statistics_of_keys_stay_with_python(graphs, architecture, statistics):
    model = tiny_model(architecture)
    with trace(model, statistics):
        generate(model)
    assert graphs.captures == 0


def test_passes_outside_generate_and_dynamic_caches_stay_with_python(graphs):
    model, (ids, mask) = tiny_model("llama"), padded()
    with trace(model, STATISTICS):
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert graphs.captures == 0


def test_keys_that_move_and_weights_that_move_are_cast_or_spread_stay_with_python(graphs, monkeypatch):
    model = tiny_model("llama")
    held: dict = {}
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: held.update(kwargs), with_kwargs=True)
    with trace(model, STATISTICS):
        generate(model)
    hook.remove()
    step = Step.of((), held)
    room = step.held()
    step.mask.rule.start.add_(1)  # as if an example began elsewhere
    assert not torch.equal(room.mask.rule.start, step.mask.rule.start)
    room.load(step)
    assert torch.equal(room.mask.rule.start, step.mask.rule.start)
    held["past_key_values"].offloading = True  # keys go to host memory after each layer, and come back elsewhere
    assert Step.of((), held) is None
    held["past_key_values"].offloading = False
    assert Step.of((), held | {"input_ids": held["input_ids"].to("meta")}) is None
    with trace(model, STATISTICS), monkeypatch.context() as patch:
        patch.setattr(step_graphs, "DEVICES", ("cuda",))  # as if its weights were moved to host memory
        before = graphs.captures
        generate(model)
    assert graphs.captures == before
    model.lm_head.to("meta")
    assert step_graphs._device(model) is None
    model = tiny_model("llama", dtype=torch.bfloat16)
    with trace(model, STATISTICS), torch.autocast("cpu", dtype=torch.bfloat16):
        generate(model)
    assert graphs.captures == 0


def test_without_a_card_nothing_stands_in_the_way_of_forward():
    model = tiny_model("llama")
    own = type(model).forward
    with trace(model, STATISTICS):
        assert type(model).forward is own


def test_the_class_has_its_own_forward_after_the_block(graphs):
    model = tiny_model("llama")
    own, writes = type(model).forward, type(model).generate
    with pytest.raises(ZeroDivisionError), trace(model, STATISTICS):
        assert type(model).forward is not own
        generate(model)
        raise ZeroDivisionError
    assert type(model).forward is own and type(model).generate is writes
    other = tiny_model("llama")
    with trace(model, STATISTICS), trace(other, STATISTICS) as tracer:  # two models of one class
        generate(other)
    assert type(model).forward is own and tracer.record.sizes["query"] == 12 + NEW - 1
