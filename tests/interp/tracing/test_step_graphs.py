"""Decoding steps as graphs, with a stand-in for CUDA graphs that runs the step again from Python.

What a stand-in cannot show, that a card's graph starts the same kernels, ``interp/benchmarks/step_graphs.py`` shows.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import StaticLayer

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.sites import attached, verify
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass
from headscope.interp.statistics.queries import Generated
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing import step_graphs

STATISTICS = [LogSumExp(), Entropy(), SinkMass(first=2)]
NEW = 10


class Graphs:
    """In the place of CUDA graphs: captures leave no trace on caches, replays run the step again into the same room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays, self.captures, self.layers = 0, 0, []
        update = StaticLayer.update

        def seen(layer, *args, **kwargs):
            self.layers.append(layer)
            return update(layer, *args, **kwargs)

        monkeypatch.setattr(StaticLayer, "update", seen)
        monkeypatch.setattr(step_graphs, "DEVICES", ("cpu",))
        monkeypatch.setattr(step_graphs, "graph_of", self.graph_of)

    def graph_of(self, run):
        self.captures += 1
        layers = list({id(layer): layer for layer in self.layers}.values())
        held = [(x, x.clone()) for layer in layers for x in (layer.keys, layer.values, layer.cumulative_length)]
        first = run()
        for x, before in held:
            x.copy_(before)

        def replay() -> None:
            self.replays += 1
            for old, new in zip(tree_leaves(first), tree_leaves(self.again(run)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return first, replay

    def again(self, run):
        return run()


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


def generate(model, **options):
    ids, mask = padded()
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, cache_implementation="static", **settings, **options)


def plainly(model, statistics, monkeypatch, times: int = 1, **options):
    """The record without graphs."""
    with monkeypatch.context() as patch, trace(model, statistics, **options) as tracer:
        patch.setattr(step_graphs.Steps, "_may", lambda self: False)
        for _ in range(times):
            generate(model)
    return tracer.record


@pytest.mark.parametrize("options", [{}, {"queries": Generated()}], ids=["all", "generated"])
def test_replayed_steps_leave_the_record_and_the_text_of_python(graphs, monkeypatch, options):
    model = tiny_model("llama")
    untraced = generate(model)
    expected = plainly(model, STATISTICS, monkeypatch, times=2, **options)
    assert graphs.replays == 0
    with trace(model, STATISTICS, **options) as tracer:
        texts = [generate(model), generate(model)]
    assert all(torch.equal(text, untraced) for text in texts)
    # of nine steps of the first text one comes first, two run both ways; the second text's cache is another one
    assert graphs.captures in (1, 2) and graphs.replays >= 2 * (NEW - 2)
    for name in expected.data_vars:  # without padding a mask has fewer rules: sums are taken in the same order
        assert float(abs(tracer.record[name] - expected[name]).max()) < 2e-6, name
        assert (tracer.record[name].isnull() == expected[name].isnull()).all()


def test_layers_that_are_not_read_keep_their_own_attention_in_the_graph(graphs, monkeypatch):
    for attention in ("sdpa", "eager"):
        model = tiny_model("llama")
        model.set_attn_implementation(attention)
        expected, before = plainly(model, STATISTICS, monkeypatch, layers=[1]), graphs.replays
        with trace(model, STATISTICS, layers=[1]) as tracer:
            generate(model)
        assert graphs.replays - before == NEW - 2
        assert max(float(abs(tracer.record[name] - expected[name]).max()) for name in expected.data_vars) < 2e-6


def test_what_depends_on_the_position_is_found_and_left_to_python(graphs, monkeypatch):
    model = tiny_model("llama")
    expected = plainly(model, [Distance()], monkeypatch)
    with trace(model, [Distance()]) as tracer:
        generate(model)
    assert graphs.replays == step_graphs.CHECKS  # at the second position the distance was another one
    assert float(abs(tracer.record["distance"] - expected["distance"]).max()) < 1e-5


@pytest.mark.parametrize("what", ["stale", "fails", "spoils"])
def test_a_graph_that_does_not_hold_is_not_used(graphs, monkeypatch, what):
    def again(run):
        if what == "stale":
            return kept
        found = run()
        if what == "fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        for layer in graphs.layers:
            layer.keys[:, :, 13].fill_(7.0)  # of the step that is held to Python's
        found[0].logits.add_(1.0)
        return found

    model = tiny_model("llama")
    untraced = generate(model)
    expected = plainly(model, STATISTICS, monkeypatch)
    graph_of = graphs.graph_of

    def capturing(run):
        nonlocal kept
        found, replay = graph_of(run)
        kept = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, found)
        return found, replay

    kept = None
    monkeypatch.setattr(step_graphs, "graph_of", capturing)
    monkeypatch.setattr(graphs, "again", again)
    with trace(model, STATISTICS) as tracer:
        assert torch.equal(generate(model), untraced)
    assert graphs.replays <= step_graphs.CHECKS
    assert max(float(abs(tracer.record[name] - expected[name]).max()) for name in expected.data_vars) < 2e-6


def test_who_watches_or_changes_a_pass_is_called_in_every_step(graphs):
    model, calls = tiny_model("llama"), []
    verify(model)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
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


def test_the_class_has_its_own_forward_after_the_block(graphs):
    model = tiny_model("llama")
    own = type(model).forward
    with pytest.raises(ZeroDivisionError), trace(model, STATISTICS):
        assert type(model).forward is not own
        generate(model)
        raise ZeroDivisionError
    assert type(model).forward is own
    other = tiny_model("llama")
    with trace(model, STATISTICS), trace(other, STATISTICS) as tracer:  # two models of one class
        generate(other)
    assert type(model).forward is own and tracer.record.sizes["query"] == 12 + NEW - 1
