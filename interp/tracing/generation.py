"""Generation under a tracer or an edit: where the response begins, which ways of generating are refused, and its steps.

A record holds the passes that a model makes, one after the other. Generation that reads every token once (greedy search
and sampling, with any cache, the prompt whole or in chunks) is such a sequence. Generation that moves examples between
steps, takes tokens back or runs other prompts in between is not, and is refused by name before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import xarray as xr
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary, prompt_boundary
from headscope.interp.sites.given import ModelLike, PreTrained
from headscope.interp.sites.interrupts import block, uninterrupted
from headscope.interp.sites.unwrap import bare_model, origin, shown
from headscope.interp.tracing.guards import Guard, guard, release


class Listener(Protocol):
    """Who wants to know of a generation: the tracer, and edits that act while reading or while writing."""

    def begin_generation(self, prompt_length: int | None) -> None:
        """Generation begins; its prompt has so many tokens, padding included (None: the passes will show it)."""

    def end_generation(self) -> None:
        """Generation is over, finished or not."""


_FORWARD = "trace a forward pass over the finished text instead"
# option of `generate`, which values of it are meant, what to call it, why it is refused
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("num_beams", lambda n: n > 1, "beam search", f"moves examples between steps; {_FORWARD}"),
    ("constraints", bool, "constrained beam search", f"moves examples between steps; {_FORWARD}"),
    ("force_words_ids", bool, "constrained beam search", f"moves examples between steps; {_FORWARD}"),
    ("penalty_alpha", lambda a: a > 0, "contrastive search", f"reads several continuations a step; {_FORWARD}"),
    ("assistant_model", bool, "assisted generation", f"takes tokens back; {_FORWARD}"),
    ("prompt_lookup_num_tokens", bool, "assisted generation by prompt lookup", f"takes tokens back; {_FORWARD}"),
    ("assistant_early_exit", bool, "assisted generation by early exit", f"takes tokens back; {_FORWARD}"),
    ("use_mtp", bool, "assisted generation by several-token prediction", f"takes tokens back; {_FORWARD}"),
    ("guidance_scale", lambda g: g != 1, "classifier-free guidance", f"reads a second prompt in between; {_FORWARD}"),
    ("use_cache", lambda on: not on, "generation without a cache", "reads the whole text again a step; leave it on"),
    (
        "cache_implementation",
        lambda c: c == "paged",
        "continuous batching",
        "mixes prompts in a pass; use another cache",
    ),
)


@block
def watching_generate(model: ModelLike, listener: Listener, *, recorded: bool = True) -> Iterator[None]:
    """Inside the block ``model.generate`` tells ``listener`` where the prompt ends, and, where it is ``recorded``,
    refuses what a record cannot hold."""
    inner = bare_model(model)
    own = getattr(inner, "generate", None) is None or shown(model) is model and origin(model) == "transformer_lens"

    @contextmanager
    def around(args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[None]:
        if recorded:
            check_generation(inner, options)
        listener.begin_generation(_prompt_length(inner, args, options))
        try:
            yield
        finally:
            listener.end_generation()

    made: list[Guard | None] = []
    try:
        with uninterrupted():
            made.append(guard(inner, "generate", around) if not own else None)
        yield
    finally:
        try:
            with uninterrupted():
                release(made[0] if made else None)
        finally:
            release(made[0] if made else None)  # an interrupt may have come just before


class GenerationBoundary:
    """Publishes the boundary of what ``generate`` reads, unless a ``prompt_boundary`` around it already says."""

    def __init__(self) -> None:
        self._blocks: list[ExitStack] = []

    def begin_generation(self, prompt_length: int | None) -> None:
        """Rows before ``prompt_length`` are the prompt's, padding counted."""
        block = ExitStack()
        if prompt_length is not None and known_boundary() is None:
            block.enter_context(prompt_boundary(prompt_length, padded=True))
        self._blocks.append(block)

    def end_generation(self) -> None:
        """Passes are the user's own again."""
        self._blocks.pop().close()


def check_generation(model: PreTrained, options: dict[str, Any]) -> None:
    """Refuse what ``model.generate(**options)`` would do if its passes are not one sequence.

    Raises:
        HeadscopeError: names the way of generating, and what to do.
    """
    places = (options, vars(options.get("generation_config") or object) | {}, vars(model.generation_config))
    for name, meant, what, why in _REFUSED:
        value = next((place[name] for place in places if place.get(name) is not None), None)
        if value is not None and meant(value):
            raise HeadscopeError(f"{what} ({name}={_short(value)}) is not recorded: it {why}")


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__


def _prompt_length(model: PreTrained, args: tuple[Any, ...], options: dict[str, Any]) -> int | None:
    """The prompt's tokens with padding, those that a given cache already holds included."""
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    named = [options.get(name) for name in ("attention_mask", "input_ids", "inputs", "inputs_embeds")]
    given = [x for x in (named[0], *args[:1], *named[1:]) if isinstance(x, Tensor) and x.dim() > 1]
    return int(given[0].shape[1]) if given else None


def response_steps(record: xr.Dataset) -> xr.Dataset:
    """The row statistics of a generation by step: dimension ``step`` in place of ``query``.

    Step t is the query that chooses the response's token t: the prompt's last token for t = 0, then every token of the
    response that was read. The record's ``prompt_length`` is the boundary; with ``num_return_sequences`` = n, examples
    n b to n b + n - 1 are of prompt b. Missing steps (shorter responses, or ``queries=Generated()``, which leaves out
    step 0) are NaN, or -1 in whole numbers. Statistics of keys and blocks are of the whole text, and left out.

    Raises:
        HeadscopeError: the record has no query rows.
    """
    if "query_position" not in record.coords:
        raise HeadscopeError("this record has no query rows; trace a row statistic, e.g. Entropy()")
    position = record["query_position"].to_numpy()
    step = np.where(position >= 0, position - record["prompt_length"].to_numpy()[:, None] + 1, -1)
    count = int(step.max(initial=-1)) + 1
    example, query = np.nonzero(step >= 0)
    found = np.full((record.sizes["example"], count), -1)
    found[example, step[example, query]] = query
    index = xr.DataArray(found, dims=("example", "step"), coords={"step": np.arange(count)})
    rows = record.drop_vars([name for name, value in record.data_vars.items() if "query" not in value.dims])
    used = {dim for value in rows.data_vars.values() for dim in value.dims} - {"query"}
    rows = rows.drop_vars([name for name in rows.coords if name in rows.dims and name not in used])
    whole = {name: value.dtype for name, value in rows.data_vars.items() if np.issubdtype(value.dtype, np.integer)}
    taken = rows.isel(query=index.clip(min=0)).where(index >= 0)
    taken = taken.assign({name: taken[name].fillna(-1).astype(dtype) for name, dtype in whole.items()})
    taken = taken.assign_coords(query_position=xr.where(index >= 0, taken["query_position"], -1))
    for name, value in rows.data_vars.items():  # axes by each variable's own: a Dataset's are in no order
        taken[name] = taken[name].transpose(..., *["step" if dim == "query" else dim for dim in value.dims])
    return taken.assign_coords(query_position=taken["query_position"].transpose("example", "step"))
