"""Threads: models of their own side by side, and one traced model that two threads call at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.statistics import Entropy
from headscope.interp.survey.eager import eager_weights
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace


def in_threads(*works: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def entropy(model: Any, ids: Tensor) -> Tensor:
    with eager_weights(model) as seen, torch.no_grad():
        model(ids)
    p = torch.stack([one for _, one in seen], 1).double()
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def test_two_models_are_verified_and_traced_in_two_threads() -> None:
    models = [[tiny_model("llama", seed=10 * thread + n) for n in range(6)] for thread in range(2)]
    prompts = [torch.randint(5, 90, (1, 10 + thread)) for thread in range(2)]
    wanted = [[entropy(model, ids) for model in row] for row, ids in zip(models, prompts, strict=True)]

    def work(thread: int) -> None:
        for model, right in zip(models[thread], wanted[thread], strict=True):
            for _ in range(3):
                with trace(model, [Entropy()]) as tracer:
                    model(prompts[thread])
                assert (torch.tensor(tracer.record["entropy"].to_numpy()) - right).abs().max() < 1e-4

    in_threads(lambda: work(0), lambda: work(1))
    assert {model.config._attn_implementation for row in models for model in row} == {"sdpa"}
    assert not [name for name in AttentionInterface._global_mapping if "headscope" in name]


class Waits(Handler):
    """Holds a pass where it is until another thread has tried."""

    def __init__(self, barrier: threading.Event, go: threading.Event) -> None:
        self.barrier, self.go, self.first = barrier, go, True

    def edit(self, call: AttentionCall) -> AttentionCall:
        if self.first:
            self.first = False
            self.barrier.set()
            assert self.go.wait(60)
        return call


def test_a_second_thread_is_refused_while_a_pass_runs_and_the_record_stays_right() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 90, (1, 12))
    right = entropy(model, ids)
    inside, go, refused = threading.Event(), threading.Event(), []

    def other() -> None:
        assert inside.wait(60)
        try:
            with pytest.raises(HeadscopeError, match="called from two threads at once.*hold a lock") as caught:
                model(ids[:, :5])
            refused.append(str(caught.value))
        finally:
            go.set()

    with trace(model, [Entropy()]) as tracer, attached(model, Waits(inside, go)):
        in_threads(lambda: model(ids), other)
        model(ids)
    assert len(refused) == 1 and "\n" not in refused[0]
    found = torch.tensor(tracer.record["entropy"].to_numpy())
    assert found.shape[0] == 2 and (found - right).abs().max() < 1e-4


def test_threads_may_take_turns() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 90, (1, 9))
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    made: list[Tensor] = []
    with trace(model, [Entropy()]) as tracer:
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        in_threads(lambda: made.append(model.generate(ids, **options)))
    assert torch.equal(made[0], wanted)
    n = tracer.record.sizes["query"]
    right = entropy(model, wanted)[..., :n]
    assert n == wanted.shape[1] - 1
    assert (torch.tensor(tracer.record["entropy"].to_numpy()) - right).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_in_the_middle_of_a_pass_blocks_nobody() -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 90, (1, 9))

    class Dies(Handler):
        def edit(self, call: AttentionCall) -> AttentionCall:
            raise SystemExit  # torch tells no hook of what is no Exception

    with trace(model, [Entropy()]) as tracer:
        with attached(model, Dies()):
            thread = threading.Thread(target=lambda: model(ids))
            thread.start()
            thread.join()
        model(ids)
    assert tracer.record.sizes["example"] == 1
