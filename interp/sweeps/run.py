"""Sweeps: statistics of every head on a data set of prompts, streamed to disk, resumable, on one process or several.

Prompts run in batches of like lengths under a memory budget; every batch becomes a part of the record as it finishes,
so that memory does not grow with the data set and a killed sweep continues where it stopped. Under
``accelerate launch`` or ``torchrun`` the processes share the batches out, and write to one folder that all of them see.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xarray as xr

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.load import load_model
from headscope.interp.records.record import MANIFEST, SWEEP, open_record, part_examples, write_manifest
from headscope.interp.records.store import Store, stored
from headscope.interp.runs.actors import Ray, engine_of
from headscope.interp.runs.elsewhere import maker
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import locked, write_atomically
from headscope.interp.runs.journal import plain, require_same
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import describe, fingerprint, provenance
from headscope.interp.runs.sealed import sealed, unsealed
from headscope.interp.sites import handlers_on
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.sizes import tower_size
from headscope.interp.statistics import Statistic
from headscope.interp.statistics.declared import Named, declared
from headscope.interp.statistics.exactness import is_exact
from headscope.interp.statistics.queries import Queries
from headscope.interp.sweeps.batches import Budget, Cost, Prompts, bytes_of
from headscope.interp.sweeps.examples import check_statistics
from headscope.interp.sweeps.pieces import Chosen, Piece, gathered, written
from headscope.interp.sweeps.ranks import Ranks, ranks
from headscope.interp.tracing.tracer import Tracer


def sweep(
    model: Loadable,
    prompts: Iterable[Any],
    statistics: Named | Iterable[Named],
    *,
    out: str | Path,
    memory: str | int = "1GiB",
    largest: int = 64,
    padding: bool = True,
    layers: Sequence[int] | None = None,
    queries: Queries | None = None,
    tower: str | None = None,
    verify: bool = True,
    progress: bool = True,
    engine: Ray | str | None = None,
) -> xr.Dataset:
    """Record ``statistics`` of every prompt of a data set; killed, it continues when it is run again.

    The record has the prompts as its ``example`` dimension, in their order, without padding. Other batches (another
    ``memory``, number of processes or device of the same kind) change its integers and positions not at all, and its
    other numbers by the rounding of a matrix product of another shape; in models that choose (mixtures of experts), a
    choice that was a tie may turn.

    Args:
        model: load_model's result or a Hugging Face model that takes ``input_ids``.
        prompts: texts, sequences of token ids, or rows with a ``text`` or ``input_ids`` (a data set of ``datasets``).
        statistics: declarations. Spans and targets with one entry an example have one entry a prompt, in their order.
        out: folder of the record, or a URL that fsspec opens (``s3://bucket/run``; a copy stays on this machine);
            ``load_record(out)`` and ``open_record(out)`` read it later.
        memory: what a batch may take above the model's own, for each process: bytes or ``"2GiB"``. An estimate (see
            ``headscope.interp.sweeps.batches.Cost``), not a limit that is enforced.
        largest: prompts in a batch, at most; what is lost by a kill.
        padding: False runs only prompts of one length together, for models that cannot be traced padded; so do
            statistics that are not exact under padding.
        layers, queries, tower, verify: as ``headscope.interp.trace`` takes them.
        engine: ``"ray"``, or a ``headscope.interp.runs.actors.Ray`` that says how many workers: actors on the hosts of
            a Ray cluster, which load the model (by its name, if it was given so) and send their parts back to this
            process, which writes them. None: this process, and those that were launched with it.

    Returns:
        The record, read from ``out`` where it is used (``.load()`` reads all), on every process.

    Raises:
        HeadscopeError: a prompt that alone takes more than ``memory``, and whatever ``Prompts``, ``check_statistics``
            and ``trace`` refuse, before anything runs; ``out`` holds another sweep, or another process writes there.
    """
    actors, (store, out) = engine_of(engine), stored(out)
    lm = _load(model)
    given, statistics = Prompts(lm, prompts), declared(statistics)
    chosen = Chosen(layers, queries, tower, verify)
    Tracer(lm, statistics, layers=layers, queries=queries, tower=tower)
    tower_size(lm, tower).check_layers(layers or ())
    check_statistics(statistics, given.lengths, queries)
    together = padding and all(is_exact(statistic, "padding") for statistic in statistics)
    budget = Budget(Cost(lm, statistics, layers, queries), bytes_of(memory), largest, together)
    everything = budget.batches(dict(enumerate(given.lengths)))
    announce(
        ((length, 0) for length in given.lengths),
        [MANIFEST, SWEEP, "part-*.zarr"],
        batches=len(everything),
        memory=max(budget.cost(len(batch.examples), batch.width) for batch in everything),
    )
    made = provenance(lm, statistics=[str(statistic) for statistic in statistics], queries=str(queries))
    made |= {"tokens_sha256": given.sha256, "prompts": len(given)}
    with ranks(lm.inner) as us, ExitStack() as stack:
        done = _begin(us, stack, out, _settings(lm, given, statistics, chosen, made))
        if us.first:
            store.keep(SWEEP)
        waiting = budget.batches({i: length for i, length in enumerate(given.lengths) if i not in done})
        mine = waiting[us.rank :: us.size]
        before = f", {len(done)} of {len(given)} prompts done before" if done else ""
        pieces = (Piece.of(given, batch, statistics, chosen) for batch in mine)
        if actors is not None:
            finished: Any = gathered(actors, maker(model, lm), pieces, out)
        else:
            finished = written(lm, pieces, out, write=us.writes)
        for name in track(finished, f"trace{before}", enabled=progress and us.first, total=len(mine)):
            store.keep(name)
        us.share(None)
        if us.first and (waiting or not (out / MANIFEST).exists()):
            _finish(out, len(given), made, store)
        us.share(None)
    return open_record(out)


def _load(model: Loadable) -> LanguageModel:
    lm = load_model(model)
    if getattr(lm.inner.config, "is_encoder_decoder", False):
        raise HeadscopeError(f"{lm.name} has an encoder and a decoder, and a sweep gives one text; use `trace`")
    return lm


def _settings(
    lm: LanguageModel, given: Prompts, statistics: Sequence[Statistic], chosen: Chosen, made: dict[str, Any]
) -> dict[str, Any]:
    """What decides the numbers, and must therefore be the same when a sweep is continued."""
    edits = [(handler, tower) for handler, tower in handlers_on(lm) if _changes(handler)]
    return plain(
        {
            "model": {key: value for key, value in made["model"].items() if key != "device"},
            "weights": fingerprint(lm.model),
            "prompts": {"count": len(given), "tokens_sha256": given.sha256},
            "statistics": [describe(statistic) for statistic in statistics],
            "queries": describe(chosen.queries),
            "layers": None if chosen.layers is None else sorted(set(chosen.layers)),
            "tower": chosen.tower,
            "interventions": [
                {"tower": tower, "edit": edit.describe() if hasattr(edit, "describe") else describe(edit)}
                for edit, tower in edits
            ],
        }
    )


def _changes(handler: Handler) -> bool:
    return type(handler).edit is not Handler.edit or type(handler).edit_output is not Handler.edit_output


def _begin(us: Ranks, stack: ExitStack, out: Path, settings: dict[str, Any]) -> set[int]:
    """The prompts that are done already; the folder is this run's until ``stack`` closes.

    Raises:
        HeadscopeError: on every process, where one refuses.
    """
    done: set[int] = set()
    refusal: str | None = None
    if us.first:
        try:
            stack.enter_context(locked(out / SWEEP))
            done = _resume(out, settings)
        except HeadscopeError as error:
            refusal = str(error)
    shared = us.share((refusal, settings, done))
    refusal, first, done = shared[0]
    if refusal is None and any(theirs != first for _, theirs, _ in shared):
        refusal = "the processes of this sweep were given different prompts, models or statistics; start them alike"
    if refusal is not None:
        raise HeadscopeError(refusal)
    return done


def _resume(out: Path, settings: dict[str, Any]) -> set[int]:
    """The prompts whose parts are in ``out``; its settings are written where there are none yet."""
    parts = sorted(path.name for path in out.glob("part-*"))
    if parts or (out / MANIFEST).exists():
        try:
            found = unsealed(json.loads((out / SWEEP).read_bytes()))
        except (OSError, ValueError) as error:
            raise HeadscopeError(
                f"{out} already holds a record whose {SWEEP} is not a sweep's ({error}); choose another folder"
            ) from error
        require_same(out / SWEEP, found, settings)
    else:
        write_atomically(out / SWEEP, sealed(settings))
    for unfinished in out.glob(".part-*"):
        shutil.rmtree(unfinished)
    return {int(number) for name in parts for number in part_examples(out, name)}


def _finish(out: Path, prompts: int, made: dict[str, Any], store: Store) -> None:
    parts = sorted(path.name for path in out.glob("part-*"))
    numbers = sorted(int(number) for name in parts for number in part_examples(out, name))
    if numbers != list(range(prompts)):
        raise HeadscopeError(
            f"{prompts - len(set(numbers))} of {prompts} prompts are not in {out}: processes must write to one folder"
        )
    write_manifest(out, parts, numbered=True, headscope=json.dumps(made, default=str))
    store.keep(MANIFEST)
