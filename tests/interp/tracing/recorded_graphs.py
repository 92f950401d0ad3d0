"""A stand-in for CUDA graphs on the CPU: torch's operations are recorded while a step runs and done again on the same
tensors, and whatever Python worked out stays as it was, as in a graph.

Like a card's, it refuses to capture what waits for a number or brings one from the host, carries nothing out while it
captures, and leaves what it made undefined until the first replay. What it cannot show, that a card's graph starts the
same kernels, ``interp/benchmarks/card.py`` shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria, StoppingCriteriaList

from headscope.interp.statistics import Entropy, LogSumExp, SinkMass
from headscope.interp.tracing import step_graphs
from headscope.kernels import attention, reference
from headscope.kernels.masks import Mask

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "lift_fresh"}
ASKING = Mask.tile


def tensors(*found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def memory(x: Tensor) -> int:
    return 0 if type(x) not in (Tensor, torch.nn.Parameter) else x.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """``steps``: operations, their arguments, and what they made (None: they wrote into their arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor] | None]] = []
        self.made: list[Tensor] = []
        self.written: list[tuple[Tensor, Tensor]] = []  # of what was there before, with what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_bool = func.overloadpacket.__name__.startswith("index") and any(
            x.dtype == torch.bool for x in tensors(args[1])
        )
        if func.overloadpacket.__name__ in WAITS or by_bool:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        writes = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        own = {memory(x) for x in self.made}
        self.written += [(x, x.clone()) for each in writes for x in tensors(given[each]) if memory(x) not in own]
        found = func(*args, **kwargs)
        there = {memory(x) for x in tensors(args, kwargs)}
        if writes:
            self.steps.append((func, args, kwargs, None))
        elif not any(memory(x) in there for x in tensors(found)):  # no view
            self.steps.append((func, args, kwargs, tensors(found)))
            self.made += tensors(found)
        return found

    def undo(self) -> None:
        """Nothing was carried out."""
        for x, before in reversed(self.written):
            x.copy_(before)
        for x in self.made:
            x.fill_(torch.nan if x.is_floating_point() else 1)

    def replay(self, without: str) -> None:
        for func, args, kwargs, made in self.steps:
            if func.overloadpacket.__name__ == without:
                continue
            found = func(*args, **kwargs)
            for old, new in zip(made or (), tensors(found) if made else (), strict=True):
                old.copy_(new)


class Graphs:
    """In the place of CUDA graphs. Replays leave out the operation ``without``; ``spoil`` is called after each of them
    with what was captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        self.without = ""
        self.spoil: Callable[[Any], None] = lambda found: None
        monkeypatch.setattr(step_graphs, "DEVICES", ("cpu",))
        monkeypatch.setattr(step_graphs, "graph_of", self.graph_of)
        # the kernels of a card read on it where keys begin and end; those of the CPU ask
        monkeypatch.setattr(attention, "_engine", lambda *_: reference.attend)
        monkeypatch.setattr(Mask, "tile", tile)

    def graph_of(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        recording = Recording()
        try:
            with recording:
                found = run()
        finally:
            recording.undo()

        def replay() -> None:
            self.replays += 1
            recording.replay(self.without)
            self.spoil(found)

        return found, replay


def tile(mask: Mask, rows: Tensor, keys: Tensor, heads: Tensor | None = None) -> Tensor | None:
    """``Mask.tile`` without a question to the device, of the rules that a step has."""
    if mask.chunk is not None or mask.segments is not None or mask.rule is not None:
        return ASKING(mask, rows, keys, heads)
    q, k = rows + mask.query_offset, keys + mask.key_offset
    seen = torch.ones(1, 1, len(q), len(k), dtype=torch.bool)
    seen = seen if mask.right is None else seen & (k <= q[:, None] + mask.right)
    seen = seen if mask.left is None else seen & (k >= q[:, None] - mask.left)
    seen = seen if mask.start is None else seen & (k >= mask.start[:, None])[:, None, None]
    return seen if mask.end is None else seen & (k < mask.end[:, None])[:, None, None]


STATISTICS = [LogSumExp(), Entropy(), SinkMass(first=2)]
NEW = 10


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


def generate(model, *, ids=None, criterion=None, **options):
    given, mask = padded()
    inputs = {"input_ids": given, "attention_mask": mask} if ids is None else {"input_ids": ids}
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"cache_implementation": "static"} if "past_key_values" not in options else {}
    settings |= {"stopping_criteria": StoppingCriteriaList([criterion])} if criterion else {}
    return model.generate(**inputs, **settings | options)


class At(StoppingCriteria):
    """Does something after so many tokens were chosen."""

    def __init__(self, count: int, do) -> None:
        self.count, self.do = count, do

    def __call__(self, ids, scores, **_):
        self.count -= 1
        if self.count == 0:
            self.do()
        return torch.zeros(len(ids), dtype=torch.bool)


@contextmanager
def python_alone(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step_graphs.Steps, "_may", lambda self: False)
        yield


def check_alike(record, expected) -> None:
    """A mask without padding has fewer rules, but sums are taken in the same order: all is the same."""
    assert dict(record.sizes) == dict(expected.sizes)
    for name in [*expected.data_vars, "query_position", "length", "prompt_length"]:
        assert record[name].equals(expected[name]), name
