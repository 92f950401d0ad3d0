"""Decoding steps as graphs over several texts in one block, and texts that break off or are read on their way."""

from __future__ import annotations

import gc
import signal
import weakref

import pytest
import torch
from transformers import StaticCache

from headscope.interp import trace
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing import step_graphs
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


def test_a_cache_that_is_continued_or_begun_anew(graphs, monkeypatch):
    model, (ids, _) = tiny_model("llama"), padded()

    def talk(cache):
        first = generate(model, ids=ids, past_key_values=cache)
        generate(model, ids=torch.cat([first, ids[:, :3]], 1), past_key_values=cache)
        cache.reset()
        return generate(model, ids=ids.flip(0), past_key_values=cache)

    with python_alone(monkeypatch), trace(model, STATISTICS) as wanted:
        expected = talk(StaticCache(config=model.config, max_cache_len=64))
    with trace(model, STATISTICS) as tracer:
        assert torch.equal(talk(StaticCache(config=model.config, max_cache_len=64)), expected)
    assert graphs.captures == 3 and graphs.replays == 3 * (NEW - 2)
    check_alike(tracer.record, wanted.record)


@pytest.mark.parametrize("new", [2, 3, 4, 5])
def test_a_text_that_ends_while_its_graph_is_checked(graphs, monkeypatch, new):
    """The cache ends with it: there is no room for a token more."""
    model = tiny_model("llama")
    with python_alone(monkeypatch), trace(model, STATISTICS) as wanted:
        expected = generate(model, max_new_tokens=new)
    del model._previous_max_cache_length
    with trace(model, STATISTICS) as tracer:
        assert torch.equal(generate(model, max_new_tokens=new), expected)
    assert graphs.replays == new - 2
    check_alike(tracer.record, wanted.record)


def test_an_interrupt_waits_until_a_step_is_captured(graphs, monkeypatch):
    graph_of, ended = step_graphs.graph_of, []

    def capturing(run, device):
        signal.raise_signal(signal.SIGINT)
        ended.append(graph_of(run, device))
        return ended[0]

    monkeypatch.setattr(step_graphs, "graph_of", capturing)
    with pytest.raises(KeyboardInterrupt), trace(model := tiny_model("llama"), STATISTICS):
        generate(model)
    assert ended


def test_nothing_of_a_generation_is_held_after_it(graphs):
    model = tiny_model("llama")
    with trace(model, STATISTICS):
        cache = StaticCache(config=model.config, max_cache_len=64)
        generate(model, ids=padded()[0], past_key_values=cache)
        assert graphs.replays
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)  # other memory


@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_record_is_read_or_cleared_while_a_text_is_written(graphs, monkeypatch, count):
    model = tiny_model("llama")

    def records():
        found = []
        with trace(model, STATISTICS) as tracer:
            generate(model, criterion=At(count, lambda: found.append(tracer.record)))
            found.append(tracer.record)
            tracer.clear()
            generate(model, criterion=At(count, tracer.clear))
        return [*found, tracer.record]

    with python_alone(monkeypatch):
        wanted = records()
    for record, expected in zip(records(), wanted, strict=True):
        check_alike(record, expected)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("within", [False, True], ids=["between steps", "at the end of a step"])
def test_a_text_that_breaks_off_leaves_the_steps_that_ended(graphs, monkeypatch, count, within):
    model = tiny_model("llama")

    def interrupt(*_):
        raise KeyboardInterrupt

    def broken(after):
        with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
            generate(model, criterion=At(count, lambda: after(patch)))
        generate(model)

    def next_step(patch):
        """Break off the next step when its rows are there already."""
        patch.setattr(step_graphs, "tree_map_only", interrupt)  # of a replayed one
        patch.setattr(Route, "forget_pass", lambda route: route.inside is None and interrupt())  # of another

    with python_alone(monkeypatch), trace(model, STATISTICS) as wanted:
        broken(interrupt)
    with trace(model, STATISTICS) as tracer:
        broken(next_step if within else interrupt)
    check_alike(tracer.record, wanted.record)
