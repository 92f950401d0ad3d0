"""One batch of a sweep: traced in this process, or in a worker that sends its part of the record back."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.records.checksums import FOLDER
from headscope.interp.records.record import write_part
from headscope.interp.runs.actors import Ray
from headscope.interp.runs.files import write_atomically, writing
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics import Statistic
from headscope.interp.statistics.queries import Queries
from headscope.interp.sweeps.batches import Batch, Prompts
from headscope.interp.sweeps.examples import for_examples, own_rows
from headscope.interp.tracing.recording import trace


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a sweep hands on to ``trace`` for every batch."""

    layers: Sequence[int] | None
    queries: Queries | None
    tower: str | None
    verify: bool


@dataclass(frozen=True, eq=False)
class Piece:
    """A batch with all that it takes to trace it: token ids on no device of its own, statistics of its prompts."""

    batch: Batch
    inputs: dict[str, Tensor]
    statistics: tuple[Statistic, ...]
    chosen: Chosen

    @classmethod
    def of(cls, given: Prompts, batch: Batch, statistics: Sequence[Statistic], chosen: Chosen) -> Piece:
        """The piece of the prompts with the numbers of ``batch``."""
        mine = tuple(for_examples(statistic, batch.examples) for statistic in statistics)
        return cls(batch, {name: x.cpu() for name, x in given.batch(batch.examples).items()}, mine, chosen)

    @property
    def name(self) -> str:
        """Of its part of the record."""
        return f"part-{min(self.batch.examples):08d}.zarr"

    def trace(self, lm: LanguageModel) -> xr.Dataset:
        """The record of the batch, its examples numbered as the prompts are."""
        batch, chosen = self.batch, self.chosen
        inputs = {name: x.to(lm.device) for name, x in self.inputs.items()}
        taken = {"use_cache": False, "logits_to_keep": 1}
        few = {name: value for name, value in taken.items() if takes(lm.inner, name)}
        options = {"layers": chosen.layers, "queries": chosen.queries, "tower": chosen.tower, "verify": chosen.verify}
        try:
            with trace(lm, self.statistics, **options) as tracer:  # type: ignore[arg-type]
                logits = getattr(lm.model(**inputs, **few), "logits", None)
        except torch.OutOfMemoryError as error:
            raise HeadscopeError(
                f"out of memory at {len(batch.examples)} prompts of {batch.width} tokens; run the sweep again with "
                "less memory=, and it will continue"
            ) from error
        if isinstance(logits, Tensor) and logits.ndim == 3:
            longest = inputs["attention_mask"].all(1).to(logits.device)  # where the last logits are the prompt's own
            lm.check_finite(logits[longest, -1])
        return own_rows(tracer.record, chosen.queries).assign_coords(example=np.asarray(batch.examples))


def written(lm: LanguageModel, pieces: Iterable[Piece], out: Path, *, write: bool) -> Iterator[str]:
    """Trace ``pieces`` and, where it is this process's to do, ``write`` their parts to ``out``; their names.

    A part is compressed and written by a thread while the next one is made and traced, so that two are in memory; where
    that next one fails, the part is finished and named first.
    """
    with ThreadPoolExecutor(1) as writer:
        before: tuple[str, Future[None]] | None = None
        coming = iter(pieces)
        while True:
            try:
                piece = next(coming, None)
                part = None if piece is None else piece.trace(lm)
            finally:
                if before is not None:
                    before[1].result()
                    yield before[0]
            if piece is None or part is None:
                return
            before = piece.name, writer.submit(write_part, part, out, piece.name) if write else _nothing()
            del part


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


def gathered(actors: Ray, make: Callable[[], LanguageModel], pieces: Iterable[Piece], out: Path) -> Iterator[str]:
    """Trace ``pieces`` in workers and write their parts to ``out`` as they come; their names."""
    for _, (name, packed) in actors.map(make, packed_part, pieces):
        _unpack(packed, out, name)
        yield name


def packed_part(lm: LanguageModel, piece: Piece) -> tuple[str, bytes]:
    """A part of the record with its list of files, as the bytes of a zip archive."""
    with tempfile.TemporaryDirectory() as folder:
        write_part(piece.trace(lm), Path(folder), piece.name)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed already
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(folder).as_posix())
    return piece.name, stream.getvalue()


def _unpack(packed: bytes, out: Path, name: str) -> None:
    """Write a packed part into the record at ``out``: whole, or not at all."""
    unfinished = out / f".{name}.{os.urandom(4).hex()}"
    try:
        with writing(out), zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for member in archive.namelist():
                if member.startswith(f"{name}/"):
                    archive.extract(member, unfinished)
            for file in (file for file in unfinished.rglob("*") if file.is_file()):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            write_atomically(out / FOLDER / f"{name}.json", archive.read(f"{FOLDER}/{name}.json"))
            os.replace(unfinished / name, out / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
