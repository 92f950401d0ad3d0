"""``with trace(...)``: the door to the tracer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics.declared import Named
from headscope.interp.statistics.queries import Queries
from headscope.interp.tracing.generation import watching_generate
from headscope.interp.tracing.step_graphs import step_graphs
from headscope.interp.tracing.tracer import Tracer


@contextmanager
def trace(
    model: ModelLike,
    statistics: Named | Iterable[Named],
    *,
    layers: Sequence[int] | None = None,
    queries: Queries | None = None,
    tower: str | None = None,
    verify: bool = True,
    grad: bool = False,
) -> Iterator[Tracer]:
    """Record ``statistics`` of every forward pass of ``model`` inside the block; nothing stays on the model after it.

    Row statistics of a megabyte or more leave a GPU for (pinned) host memory as they are made, so that a long text
    needs no more of the card than untraced; the host needs room for the record twice.

    Steps of ``generate`` over a static cache run as CUDA graphs where this block alone is on the model and statistics
    are rows of LogSumExp, MaxLogit, Entropy, SinkMass, SpanMass or TopKeys (``headscope.interp.tracing.step_graphs``).

    Args:
        model: load_model's result or a Hugging Face model.
        statistics: declarations from ``headscope.interp.statistics``: one or several, also by class (``Entropy``) or
            by name (``"entropy"``) where the default settings will do.
        layers: record only these layers (all by default); the others run the model's own attention, untouched.
        queries: ``Last(n)``, ``Every(n)`` or ``Generated()`` limit the row statistics; None records every query.
        tower: which one to record where a model has several: ``"language"`` (the default where there is one),
            ``"vision"``, ``"audio"``, ``"encoder"``, ``"decoder"``, ``"cross"``, ``"connector"``, or a pattern of
            module names such as ``"model.layers.*.self_attn"``. One record holds one tower.
        verify: check once per model that our attention equals the model's own (see ``headscope.interp.sites``).
        grad: gradients are off inside the block; True keeps what a backward pass through the model needs. Statistics
            carry none either way.

    Raises:
        HeadscopeError: an architecture that cannot be traced exactly or a layer that does not attend, named, before
            anything runs; or a layer of ``layers`` that attended in no finished pass, when the block ends.
    """
    tracer = Tracer(model, statistics, layers=layers, queries=queries, tower=tower)
    try:
        with (
            attached(model, tracer, tower=tower, layers=layers, verify=verify, grad=grad) as route,
            watching_generate(model, tracer),
            step_graphs(model, tracer, route),
        ):
            yield tracer
    finally:
        tracer.end()
