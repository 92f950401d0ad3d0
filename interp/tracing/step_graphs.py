"""Decoding steps over a static cache as CUDA graphs.

``generate`` with ``cache_implementation="static"`` runs the same kernels on the same memory in every step, and most of
a step's time is Python that starts them. Ours too: so a traced step is captured once with its statistics, and then
replayed until its ``generate`` ends. What is replayed is first held to what runs from Python: at two different
positions both run, and must give the same logits and statistics to the bit. Steps that cannot be captured, or that
differ, go on as before, with the same numbers; so do statistics that do not say that a graph may hold them.

Between two steps of one ``generate`` a graph sees what changes in place, and hooks, edits and traces that come or go,
but not what a logits processor, say, puts in the place of a weight or a module, or which adapter it switches on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.attachment import Attachment
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.huggingface.passes import is_ours
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.interrupts import block, uninterrupted
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics import ROW, CallStatistic
from headscope.interp.statistics.queries import Generated
from headscope.interp.tracing.guards import Guard, guard, release, unguarded
from headscope.interp.tracing.piece import Piece
from headscope.interp.tracing.step import Step
from headscope.interp.tracing.tracer import Tracer

DEVICES = ("cuda",)  # whose steps can be captured
CHECKS = 2  # steps that run both ways before the graph alone does
T = TypeVar("T")
Values = dict[str, Tensor]  # name -> (layer, ...)


@block
def step_graphs(model: ModelLike, tracer: Tracer, route: Any) -> Iterator[None]:
    """Inside the block steps of ``model.generate`` over a static cache on a GPU become graphs where they can."""
    inner = bare_model(model)
    made: list[Guard | None] = []
    try:
        with uninterrupted():
            if isinstance(route, Route) and _is_captured(tracer) and _device(inner) is not None:
                steps = Steps(inner, tracer, route)
                made.append(guard(inner, "forward", instead=steps.forward))
                made.append(guard(inner, "generate", steps.generation))
        yield
    finally:
        try:
            with uninterrupted():
                _release(made)
        finally:
            _release(made)  # an interrupt may have come just before


def _release(made: list[Guard | None]) -> None:
    for each in made:
        release(each)


def _device(model: nn.Module) -> torch.device | None:
    """The one device where a model's weights are, if its steps can be captured: a graph is one device's."""
    devices = {x.device for x in model.parameters()}
    return devices.pop() if len(devices) == 1 and {x.type for x in devices} <= set(DEVICES) else None


def _is_captured(tracer: Tracer) -> bool:
    """Whether a graph can leave a step's statistics: they are rows, reduced by the kernels, and follow from the keys
    that a query sees and not from its position, which a graph holds as it was."""
    rows = all(
        each.kind == ROW and each.at_any_position and not isinstance(each, CallStatistic) for each in tracer.statistics
    )
    return (
        bool(tracer.statistics)
        and rows
        and not tracer.streams
        and not tracer.follows
        and (tracer.queries is None or isinstance(tracer.queries, Generated))
    )


class Steps:
    """In the place of ``model.forward`` while ``tracer`` is attached by ``route``."""

    def __init__(self, model: nn.Module, tracer: Tracer, route: Route) -> None:
        self.model, self.tracer, self.route = model, tracer, route
        self.plain = unguarded(model, "forward")
        self._hooks: list[dict[int, Any]] = []
        self._whole = False
        self._forget()

    def _forget(self) -> None:
        self._kind: Any = None  # of the last step
        self._graph: StepGraph | None = None
        self._seen, self._ours = -1, False

    @contextmanager
    def generation(self, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
        """Around a call of ``generate``, with which graphs begin and end: the next one may find other weights, modules
        and whatever else a model holds, and the memory of a cache that is not needed any more is free."""
        self._forget()
        self._whole, parts = _device(self.model) is not None, self.model.modules()
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        try:
            yield
        finally:
            self._forget()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass, or its step's graph."""
        step = Step.of(args, kwargs) if self._may() else None  # None: another pass
        if step is None or not self._is_response(step):
            return self.plain(*args, **kwargs)
        if step.kind != self._kind:  # it may be the only one of its kind
            self._kind, self._graph = step.kind, None
            return self.plain(**step.inputs())
        graph = self._graph = self._graph or StepGraph(self)
        return graph.run(step)

    def _is_response(self, step: Step) -> bool:
        """Whether ``generate`` reads a token there that it wrote."""
        return self.tracer.boundary is not None and step.offset >= self.tracer.boundary

    def _may(self) -> bool:
        """Whether nothing but the tracer sees or changes the pass that runs."""
        route = self.route
        attachment = route.handlers[0] if len(route.handlers) == 1 else None
        mine = isinstance(attachment, Attachment) and attachment.inner is self.tracer
        whole = self._whole and route.heads is None and route.rows is None and not route.maps
        still = not self.model.training and not torch.is_grad_enabled()
        still = still and not torch._C._is_any_autocast_enabled()  # which may drop the weights that it has cast
        return mine and whole and still and self._is_unwatched()

    def _is_unwatched(self) -> bool:
        """Whether no module has a hook but ours, and nobody counts operations: a graph would tell them nothing."""
        count = sum(map(len, self._hooks))
        if count != self._seen:  # asked in every step
            self._seen = count
            self._ours = all(is_ours(hook) for hooks in self._hooks for hook in hooks.values())
        return self._ours and not _has_any_global_hook() and not torch._C._len_torch_dispatch_stack()  # type: ignore[no-untyped-call]


class StepGraph:
    """The graph of one kind of step: captured at the second, and held to Python's way ``CHECKS`` times."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._checked = 0
        self._why: str | None = None  # it is not used
        self._step: Step | None = None
        self._replay: Callable[[], None] = _never
        self._output: Any = None
        self._left: list[Piece] = []
        self._values: Values = {}

    def run(self, step: Step) -> Any:
        """The model's output of ``step``, of which the tracer learns either way."""
        tracer, steps = self._steps.tracer, self._steps
        if self._why is None and self._checked >= CHECKS and tracer.continues:
            self._load(step)
            self._replay()
            steps.route.called = True
            tracer.repeat(step.offset, self._left, {name: value.clone() for name, value in self._values.items()})
            return tree_map_only(Tensor, Tensor.clone, self._output)
        output = steps.plain(**step.inputs())
        if self._why is None and self._checked < CHECKS:
            try:
                self._why = self._differs(step, output)
            except (RuntimeError, HeadscopeError) as error:  # what cannot be captured
                self._why = f"{type(error).__name__}: {error}"
            self._checked += 1
        return output

    def _differs(self, step: Step, output: Any) -> str | None:
        """Run ``step`` as a graph after Python gave ``output``: where they differ. The cache is left as it was."""
        with step.kept() as held:
            step.rewind()
            if self._step is None:
                self._capture(step)
            self._load(step)
            self._replay()
            found = step.read()
        both = ([*tree_leaves(output), *held], [*tree_leaves(self._output), *found])
        if not all(same(a, b) for a, b in zip(*both, strict=True) if isinstance(a, Tensor)):
            return "its output, or what it leaves to the cache, differs from what Python's way gives"
        self._left = self._left or self._steps.tracer.last_pass
        read = stacked(self._steps.tracer.last_pass)
        if set(read) != set(self._values) or not all(same(value, self._values[name]) for name, value in read.items()):
            return "its statistics differ from what Python's way gives"
        return None

    def _load(self, step: Step) -> None:
        assert self._step is not None
        self._step.load(step)

    def _capture(self, step: Step) -> None:
        steps, held = self._steps, step.held()
        attachment = steps.route.handlers[0]
        assert isinstance(attachment, Attachment)

        def run() -> tuple[Any, Values]:
            attachment.inner = shadow = alike(steps.tracer)
            try:
                output = steps.plain(**held.inputs())
                return output, stacked(shadow.last_pass)
            finally:
                attachment.inner = steps.tracer

        with uninterrupted():  # a stream that is left capturing is of no more use
            (self._output, self._values), self._replay = graph_of(run, step.end.device)
        self._step = held


def alike(tracer: Tracer) -> Tracer:
    """A tracer of the same that has recorded nothing, in the same generation."""
    layers = None if tracer.layers is None else sorted(tracer.layers)
    made = Tracer(tracer.model, tracer.declared, layers=layers, queries=tracer.queries, tower=tracer.tower)
    made.begin_generation(tracer.boundary)
    return made


def graph_of(run: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], None]]:
    """What ``run`` will give on ``device``, and what carries it out: it is captured, not carried out."""
    graph = torch.cuda.CUDAGraph()
    captured = torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device), captured:
        found = run()
    return found, graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are captured; torch's own stream for that is of whichever device was current when it was made."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def stacked(left: list[Piece]) -> Values:
    """What the calls of a pass left of its rows, of all layers in one tensor each.

    Raises:
        HeadscopeError: they left something else, too.
    """
    if any(set(piece.values) != {ROW} or piece.parts or piece.places for piece in left) or not left:
        raise HeadscopeError("a step left more than statistics of its rows")
    return {name: torch.stack([piece.values[ROW][name] for piece in left]) for name in left[0].values[ROW]}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaNs included."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _never() -> None:
    raise AssertionError("nothing was captured")
