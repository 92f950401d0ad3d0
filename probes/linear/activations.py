"""The heads' outputs z at chosen positions of many texts, in batches that survive a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.files import folder_of, locked, write_atomically
from headscope.interp.runs.journal import Journal
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import hash_texts, provenance
from headscope.interp.runs.sealed import sha256
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics import HeadOutput
from headscope.interp.tracing.recording import trace


def head_outputs(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    positions: Sequence[int] = (-1,),
    batch_size: int = 32,
    out: str | Path | None = None,
    progress: bool = True,
) -> NDArray[np.float32]:
    """z (example, layer, head, position, d_head), float32: each head's output before the output projection.

    Args:
        lm: load_model's result, or what load_model takes.
        texts: the prompts, with the tokenizer's special tokens added and padded to the right.
        positions: token positions from the start of a text, or from its end where negative (-1: the last token).
        batch_size: texts a forward pass.
        out: folder that keeps finished batches, so that the same call resumes there; None keeps all in memory.

    Raises:
        HeadscopeError: no tokenizer, an empty or too long text, a text shorter than ``positions`` need, an architecture
            that cannot be traced, outputs that are not numbers, or ``out`` holds a run with other settings or that goes
            on now.
    """
    out, lm = folder_of(out), load_model(lm)
    if batch_size < 1 or not positions or not texts:
        raise HeadscopeError("probing needs texts, at least one position, and a batch size of 1 or more")
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of a length together: little padding
    batches = [[texts[i] for i in order[first : first + batch_size]] for first in range(0, len(texts), batch_size)]
    config = {"model": provenance(lm)["model"], "positions": list(positions), "batch_size": batch_size}
    config["texts_sha256"] = hash_texts(texts)
    folder = None if out is None else out / "activations"
    with locked(folder):
        store = _Store(folder, config)
        waiting = [index for index in range(len(batches)) if index not in store]
        for index in track(waiting, "head outputs", enabled=progress, done=len(batches) - len(waiting)):
            store.put(index, _trace_batch(lm, batches[index], positions))
        z = np.concatenate([store.get(index) for index in range(len(batches))])
    return z[np.argsort(order)]


def _trace_batch(lm: LanguageModel, texts: list[str], positions: Sequence[int]) -> NDArray[np.float32]:
    options: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}  # the vocabulary costs more than a layer
    with trace(lm, [HeadOutput(tuple(positions))]) as tracer:
        lm(texts, **{name: value for name, value in options.items() if takes(lm.inner, name)})
    z = tracer.record["z"].to_numpy()
    if not np.isfinite(z).all():
        raise HeadscopeError(f"{lm.name}: a head's output is not a number; load it with dtype='float32'")
    return np.ascontiguousarray(z, dtype=np.float32)


class _Store:
    """Batches in memory, or one safetensors file each, listed in a journal once they are whole."""

    def __init__(self, folder: Path | None, config: dict[str, Any]) -> None:
        self.folder = folder
        self.journal = Journal(None if folder is None else folder / "batches.jsonl", config)
        self._held: dict[int, NDArray[np.float32]] = {}

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"z-{index:05d}.safetensors"

    def __contains__(self, index: int) -> bool:
        return index in self._held or (index in self.journal and self._file(index).exists())

    def put(self, index: int, z: NDArray[np.float32]) -> None:
        if self.folder is None:
            self._held[index] = z
            return
        data = save({"z": z})
        write_atomically(self._file(index), data)
        self.journal.add(index, {"sha256": sha256(data)})

    def get(self, index: int) -> NDArray[np.float32]:
        if self.folder is None:
            return self._held[index]
        path = self._file(index)
        try:
            data = path.read_bytes()
            if sha256(data) != self.journal.entries[index]["sha256"]:
                raise ValueError("it was changed")
            z: NDArray[np.float32] = load(data)["z"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise HeadscopeError(f"{path} is damaged ({error}); delete it and run again") from error
        return z
