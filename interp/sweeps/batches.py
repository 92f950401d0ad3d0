"""Prompts as token ids, and batches of them: sorted by length, padded little, under a memory budget."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall, Mask
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.info import text_config
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics import KEY, OUTPUT, ROW, BlockStatistic, Statistic
from headscope.interp.statistics.queries import Queries
from headscope.kernels.streaming.engine import CPU_TILE, GPU_TILE

CHUNK = 256  # prompts that are tokenized at a time to learn their lengths
SLACK = 8  # a prompt may be an eighth, or so many tokens, shorter than the longest of its batch
COPIES = 3  # of a batch's statistics: on the device, as arrays, and while a part is written
_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)} | {"B": 1}


class Prompts:
    """Prompts by number, as token ids. Kept are their lengths and one hash; ids are made again when asked for.

    Args:
        lm: load_model's result; its tokenizer reads texts, with its special tokens.
        prompts: texts, sequences of token ids, or rows with ``input_ids`` or ``text`` (such as of ``datasets``).

    Raises:
        HeadscopeError: no prompts, or one that is empty, of another kind, too long, or not of the vocabulary; numbered.
    """

    def __init__(self, lm: LanguageModel, prompts: Any) -> None:
        if isinstance(prompts, str):
            prompts = [prompts]
        if hasattr(prompts, "tolist"):
            prompts = prompts.tolist()  # arrays, tensors, columns of tables
        if not isinstance(prompts, Iterable) and not hasattr(prompts, "__getitem__"):
            raise HeadscopeError(
                f"prompts are texts or sequences of token ids, in a list, not {type(prompts).__name__}"
            )
        self._source: Any = prompts if hasattr(prompts, "__getitem__") else list(prompts)
        self._lm = lm
        self.lengths: list[int] = []
        digest = hashlib.sha256()
        for first in range(0, len(self._source), CHUNK):
            for ids in self._read(range(first, min(first + CHUNK, len(self._source)))):
                self._check(len(self.lengths), ids)
                self.lengths.append(len(ids))
                digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
        if not self.lengths:
            raise HeadscopeError("no prompt was given: pass texts or sequences of token ids")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (batch, token) of the prompts so numbered, padded on the right."""
        width = max(self.lengths[i] for i in examples)
        ids = torch.full((len(examples), width), self._padding(), dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, found in enumerate(self._read(examples)):
            if len(found) != self.lengths[examples[row]]:
                raise HeadscopeError(f"prompt {examples[row]} changed while it was traced; give lasting prompts")
            ids[row, : len(found)] = torch.tensor(found)
            real[row, : len(found)] = 1
        return {"input_ids": ids.to(self._lm.device), "attention_mask": real.to(self._lm.device)}

    def _read(self, examples: Iterable[int]) -> Iterator[list[int]]:
        """Token ids of some prompts; texts are tokenized together."""
        items = [_content(i, self._source[i]) for i in examples]
        texts = [item for item in items if isinstance(item, str)]
        if texts and self._lm.tokenizer is None:
            raise HeadscopeError(
                f"{self._lm.name} was given without a tokenizer: pass token ids, or tokenizer= to load_model"
            )
        options = {"truncation": False, "verbose": False, "return_attention_mask": False}
        encoded = iter(self._lm.tokenizer(texts, **options)["input_ids"] if texts else ())
        for item in items:
            yield list(next(encoded)) if isinstance(item, str) else item

    def _check(self, number: int, ids: list[int]) -> None:
        limit, vocabulary = self._lm.info.context_length, self._lm.info.vocab_size
        if not ids:
            raise HeadscopeError(f"prompt {number} is empty: give a prompt with text in it")
        if limit is not None and len(ids) > limit:
            raise HeadscopeError(
                f"prompt {number} has {len(ids)} tokens, more than the context of {self._lm.name} ({limit}): "
                "shorten it or take a model with a longer context"
            )
        if min(ids) < 0 or max(ids) >= max(vocabulary, self._lm.inner.get_input_embeddings().weight.shape[0]):
            raise HeadscopeError(f"prompt {number} has token ids outside the vocabulary of {vocabulary} tokens")

    def _padding(self) -> int:
        """The model's own padding token first: some position embeddings (RoBERTa's) are counted from it."""
        own = [text_config(self._lm.inner.config), self._lm.tokenizer]
        return next((i for i in (getattr(o, "pad_token_id", None) for o in own) if isinstance(i, int) and i >= 0), 0)


def _content(number: int, item: Any) -> str | list[int]:
    if isinstance(item, Mapping):
        item = item.get("input_ids", item.get("text"))
    if isinstance(item, str):
        if not item:
            raise HeadscopeError(f"prompt {number} is empty: give a prompt with text in it")
        return item
    try:
        held = item.tolist() if hasattr(item, "tolist") else list(item)
        if all(type(token) is int for token in held):
            return held
    except TypeError:
        pass
    raise HeadscopeError(
        f"prompt {number} is {type(item).__name__}: give text, token ids, or a row with 'text' or 'input_ids'"
    )


@dataclass(frozen=True)
class Batch:
    """Numbers of the prompts that run together, longest first, and the width they are padded to."""

    examples: tuple[int, ...]
    width: int


class Cost:
    """About how many bytes a batch takes above the model's own: ``cost(prompts, tokens)``.

    The sum of one layer's activations (residual stream, MLP, attention in float32), the last logits (all of them where
    the model cannot be asked for fewer), the scores of one tile, and the statistics of all recorded layers three times:
    where they were computed, as arrays, and while they are written. On a GPU the arrays are in the host's memory, so
    that both stay below the sum.
    """

    def __init__(
        self, lm: LanguageModel, statistics: Sequence[Statistic], layers: Sequence[int] | None, queries: Queries | None
    ) -> None:
        info, config, model = lm.info, text_config(lm.inner.config), lm.inner
        size = next(model.parameters()).element_size()
        mlp = next((getattr(config, n, None) for n in ("intermediate_size", "n_inner", "ffn_dim")), None)
        wide = mlp if isinstance(mlp, int) else 4 * info.d_model
        self._token = size * (8 * info.d_model + 4 * wide) + 4 * info.heads * 6 * (info.d_head + info.d_value)
        logits = 2 * 4 * info.vocab_size
        self._example = logits if takes(model, "logits_to_keep") else 0
        self._token += 0 if self._example else logits
        self._heads, self._queries = info.heads, queries
        self._tile = CPU_TILE if lm.device.type == "cpu" else GPU_TILE
        recorded = info.layers if layers is None else len(set(layers))
        each = COPIES * recorded * info.heads
        self._row = each * sum(_bytes(s) for s in statistics if s.kind == ROW)
        self._key = each * 2 * sum(_bytes(s) for s in statistics if s.kind == KEY)
        self._blocks = [s for s in statistics if isinstance(s, BlockStatistic)]
        self._each = each
        outputs = [s for s in statistics if s.kind == OUTPUT]
        self._example += each * info.d_value * sum(_bytes(s) for s in outputs)

    def __call__(self, prompts: int, tokens: int) -> int:
        rows = min(tokens, prompts * len(rows_alone(self._queries, tokens)))  # prompts end at different rows
        blocks = self._each * sum(s.bytes_a_head(tokens) for s in self._blocks)
        tile = 4 * 4 * min(self._tile, prompts * self._heads * tokens * tokens)
        return int(prompts * (self._example + blocks + tokens * (self._token + self._key) + rows * self._row) + tile)


@dataclass(frozen=True)
class Budget:
    """What a batch may be: at most ``memory`` bytes by ``cost`` and ``largest`` prompts, which are at most an eighth,
    or 8 tokens, shorter than its longest; with ``padding`` False all of one length."""

    cost: Cost
    memory: int
    largest: int = 64
    padding: bool = True

    def batches(self, lengths: Mapping[int, int]) -> list[Batch]:
        """Prompts (number -> length in tokens) as batches, longest first, so that too little memory shows at once.

        Raises:
            HeadscopeError: a prompt that alone takes more than the memory.
        """
        found: list[Batch] = []
        held: list[int] = []
        for number in sorted(lengths, key=lambda i: (-lengths[i], i)):
            if held and not self._fits(len(held) + 1, lengths[held[0]], lengths[number]):
                found.append(Batch(tuple(held), lengths[held[0]]))
                held = []
            if not held:
                self._check(number, lengths[number])
            held.append(number)
        return [*found, Batch(tuple(held), lengths[held[0]])] if held else []

    def _fits(self, prompts: int, width: int, length: int) -> bool:
        shortest = min(width - width // 8, width - SLACK) if self.padding else width
        return prompts <= self.largest and length >= shortest and self.cost(prompts, width) <= self.memory

    def _check(self, number: int, length: int) -> None:
        alone = self.cost(1, length)
        if alone > self.memory:
            raise HeadscopeError(
                f"prompt {number} has {length} tokens and takes about {math.ceil(alone / 2**20):,} MiB alone, more "
                f"than memory={self.memory / 2**20:,.0f} MiB; allow more, record fewer layers, statistics or queries, "
                "or shorten it"
            )


def _bytes(statistic: Statistic) -> int:
    values = math.prod(len(labels) for labels in statistic.coordinates.values())
    return values * sum(8 if name.endswith("_keys") else 4 for name in statistic.variables)


def rows_alone(queries: Queries | None, length: int) -> Sequence[int]:
    """The query positions that ``queries`` keeps of a prompt of ``length`` tokens that is traced alone."""
    if queries is None:
        return range(length)
    one = torch.empty(1, 1, length, 1)
    call = AttentionCall(one, one, one, Mask(), 1.0, layer=0, module="")
    rows: list[int] = queries.rows(call, prompt=True).tolist()
    return rows


def bytes_of(memory: str | int) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number of bytes as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]*)", str(memory).strip())
    if found is None or found.group(2).upper() not in _UNITS or float(found.group(1)) <= 0:
        raise HeadscopeError(f"memory={memory!r} is no size; give bytes, or for instance '2GiB' or '500MB'")
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])
