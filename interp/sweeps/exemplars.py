"""Exemplars: for heads and a statistic, the prompts of a data set where it is largest, and some of every decile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import each_part
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.sealed import sealed

DIMS = {"example", "layer", "head", "query"}
Spell = Callable[[Sequence[int]], Sequence[str]]


@dataclass(frozen=True)
class Exemplar:
    """A prompt's ``score`` for a head, and the tokens around the query of its largest value: ``tokens`` and ``values``
    from query ``start`` on, of ``length`` in all; None where a query has no value."""

    example: int
    score: float
    start: int
    length: int
    tokens: list[str]
    values: list[float | None]


@dataclass(frozen=True)
class Decile:
    """A tenth of the ranked prompts, 1 the lowest: from score ``low`` to ``high``; some of its ``prompts``."""

    decile: int
    low: float
    high: float
    prompts: int
    exemplars: list[Exemplar]


@dataclass(frozen=True)
class HeadExemplars:
    """What was found of one head: the ``top`` prompts, and the deciles, lowest first."""

    layer: int
    head: int
    top: list[Exemplar]
    deciles: list[Decile]


@dataclass(frozen=True)
class Exemplars:
    """The exemplars of some heads; ``ranked`` of ``prompts`` prompts stand behind the deciles."""

    statistic: str
    per: str
    prompts: int
    ranked: int
    heads: list[HeadExemplars]
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, atomically."""
        write_atomically(path, sealed({"format": 1, "kind": "headscope exemplars", **asdict(self)}))
        return Path(path)


def exemplars(
    record: str | Path,
    variable: str,
    heads: Any,
    spell: Spell,
    *,
    per: Literal["max", "mean"] = "max",
    top: int = 10,
    each: int = 3,
    window: int = 64,
    sample: int = 10_000,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> Exemplars:
    """The prompts of a record where a statistic of chosen heads is largest, and random ones of every decile.

    The form is that of the dashboards of sparse autoencoders (Bricken et al. 2023, "Towards Monosemanticity": top
    activations and intervals below them). [OURS] A prompt's score is the largest (or mean) value of its queries, and
    intervals are deciles of the prompts by their score.

    The record's parts are read twice, one at a time: first for the scores, then for the tokens of what was chosen. What
    is kept in between does not grow with the data set: a list of the ``top`` prompts a head, and the scores of
    ``sample`` prompts that a hash of their numbers and ``seed`` chooses, the same whatever batches they ran in. Deciles
    are exact up to ``sample`` prompts; beyond, the bounds of a decile are those of the sample, whose ranks are within
    1.96 * 0.5 / sqrt(sample) (one percent of the prompts at 10,000) in 95 of 100 samples.

    What it does not show: why a value is large. The largest of more queries is larger, so that long prompts come first
    where the statistic grows with the position, as entropy does.

    Args:
        record: folder of a sweep, finished, or another record.
        variable: a statistic with one value a query.
        heads: as of ``HeadSet.of``.
        spell: token ids as text, such as ``lm.tokenizer.convert_ids_to_tokens``.
        per: a prompt's score, "max" or "mean" over its queries.
        top: prompts with the largest score, of each head.
        each: prompts drawn of each decile.
        window: tokens that are kept of a prompt, around its largest value.

    Raises:
        HeadscopeError: a record without prompts; a variable, layer or head that the record has not or has no value of;
            a setting below 1; and as of ``load_record``.
    """
    chosen = HeadSet.of(heads)
    if per not in ("max", "mean") or min(top, each, window, sample, len(chosen)) < 1:
        raise HeadscopeError("per is 'max' or 'mean'; top, each, window, sample and the number of heads are at least 1")
    kept = _Kept(len(chosen), top, sample, seed)
    for part in each_part(record):
        values = _values(part, variable, chosen)
        reduced = np.nanmax(values, -1) if per == "max" else np.nanmean(values, -1, dtype=np.float64)
        kept.add(part["example"].to_numpy(), np.asarray(reduced, dtype=np.float64))
    if not kept.count:
        raise HeadscopeError(f"{record} holds no prompts, so there is nothing to rank: sweep some first")
    picked = [kept.of_head(at, each) for at in range(len(chosen))]
    wanted: dict[int, set[int]] = {}
    for at, (best, tenths) in enumerate(picked):
        for number in (*best, *(n for _, numbers in tenths for n in numbers)):
            wanted.setdefault(number, set()).add(at)
    shown = _read(record, variable, chosen, wanted, window, spell)
    found = []
    for at, ((layer, head), (best, tenths)) in enumerate(zip(chosen, picked, strict=True)):

        def of(numbers: Sequence[int], at: int = at) -> list[Exemplar]:
            return [Exemplar(number, kept.score(number, at), **shown[number, at]) for number in numbers]

        deciles = [
            Decile(i + 1, float(scores[0]), float(scores[-1]), len(scores), of(numbers))
            for i, (scores, numbers) in enumerate(tenths)
            if len(scores)
        ]
        found.append(HeadExemplars(layer, head, of(best), deciles))
    return Exemplars(variable, per, kept.count, len(kept.numbers), found, dict(provenance or {}))


class _Kept:
    """The best prompts of every head and a random sample of all, in memory that does not grow."""

    def __init__(self, heads: int, top: int, sample: int, seed: int) -> None:
        self.top, self.sample, self.seed, self.count = top, sample, seed, 0
        self.best: list[list[tuple[float, int]]] = [[] for _ in range(heads)]  # (-score, number), best first
        self.numbers = np.empty(0, dtype=np.int64)
        self.scores = np.empty((0, heads))

    def add(self, numbers: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        """Prompts with these numbers (n,) and scores (n, head)."""
        self.count += len(numbers)
        for at, best in enumerate(self.best):
            new = zip((-scores[:, at]).tolist(), numbers.tolist(), strict=True)
            self.best[at] = sorted([*best, *new])[: self.top]
        everyone = np.concatenate([self.numbers, numbers])
        first = np.argsort(_drawn(everyone, self.seed), kind="stable")[: self.sample]
        self.numbers, self.scores = everyone[first], np.concatenate([self.scores, scores])[first]

    def of_head(self, at: int, each: int) -> tuple[list[int], list[tuple[NDArray[np.float64], list[int]]]]:
        """Numbers of the best prompts; of every decile its ranked scores and some of its prompts, in drawn order."""
        order = np.lexsort((self.numbers, self.scores[:, at]))
        tenths = []
        for part in np.array_split(order, 10):
            tenths.append((self.scores[part, at], self.numbers[np.sort(part)[:each]].tolist()))
        return [number for _, number in self.best[at]], tenths

    def score(self, number: int, at: int) -> float:
        """The score of a prompt that is kept."""
        for negative, held in self.best[at]:
            if held == number:
                return -negative
        return float(self.scores[self.numbers == number, at][0])


def _drawn(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A pseudorandom 64-bit number for each number (the SplitMix64 mix), the same wherever it stands."""
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(seed) * np.uint64(2**32) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _values(part: xr.Dataset, variable: str, heads: HeadSet) -> NDArray[np.floating[Any]]:
    """A part's values (example, head of ``heads``, query), NaN beyond a prompt's end."""
    if variable not in part.data_vars or set(part[variable].dims) != DIMS or part[variable].dtype.kind != "f":
        has = [str(name) for name, x in part.data_vars.items() if set(x.dims) == DIMS and x.dtype.kind == "f"]
        raise HeadscopeError(
            f"{variable!r} is no statistic of this record with one number a query; it has {', '.join(has) or 'none'}"
        )
    layers, count = part["layer"].to_numpy().tolist(), part.sizes["head"]
    absent = [f"L{layer}H{head}" for layer, head in heads if layer not in layers or head >= count]
    if absent:
        held = ", ".join(map(str, layers))
        raise HeadscopeError(f"{absent[0]} is not in this record, of layers {held} with {count} heads: trace its layer")
    at = [layers.index(layer) for layer, _ in heads], [head for _, head in heads]
    values: NDArray[Any] = part[variable].transpose("layer", "head", "example", "query").to_numpy()[at]
    values = np.where(np.isinf(values), np.nan, values).transpose(1, 0, 2)
    if np.isnan(values).all(-1).any():
        raise HeadscopeError(f"{variable} of {heads} has no number for some prompt: choose heads that attend")
    return values


def _read(
    record: str | Path, variable: str, heads: HeadSet, wanted: Mapping[int, set[int]], window: int, spell: Spell
) -> dict[tuple[int, int], dict[str, Any]]:
    """What is shown of the ``wanted`` prompts, by number and place of the head among ``heads``."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for part in each_part(record):
        numbers = part["example"].to_numpy().tolist()
        rows = [row for row, number in enumerate(numbers) if number in wanted]
        if not rows:
            continue
        few = part.isel(example=rows)
        if "token" not in few:
            raise HeadscopeError("this record has no tokens (its prompts were embeddings), so there is nothing to show")
        tokens = few["token"].transpose("example", "query").to_numpy()
        for row, value in zip(range(len(rows)), _values(few, variable, heads), strict=True):
            number, real = numbers[rows[row]], np.flatnonzero(tokens[row] >= 0)
            for at in wanted[number]:
                found[number, at] = _window(tokens[row][real], value[at][real], window, spell)
    return found


def _window(ids: NDArray[np.int64], values: NDArray[np.floating[Any]], window: int, spell: Spell) -> dict[str, Any]:
    start = min(max(int(np.nanargmax(values)) - window // 2, 0), max(len(ids) - window, 0))
    cut = slice(start, start + window)
    shown = [str(token) for token in spell(ids[cut].tolist())]
    numbers = [None if np.isnan(value) else float(value) for value in values[cut]]
    return {"start": start, "length": len(ids), "tokens": shown, "values": numbers}
