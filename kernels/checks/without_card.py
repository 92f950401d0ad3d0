"""Compile the Triton kernels for Hopper on a machine without a card: every mask rule x width x precision.

    python -m headscope.kernels.checks.without_card --rules chunks,segments --widths 64,128 --dtypes bfloat16

prints a line for each kernel that does not compile, and exits with 1 if there is one. Another Triton than the installed
one: ``pip install --no-deps --target DIRECTORY triton==3.6.0``, and ``PYTHONPATH=DIRECTORY`` before the command. It
replaces Triton's driver, so it needs a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from headscope.kernels.checks.cases import MASKS, WIDTHS, random_mask
from headscope.kernels.edit_terms import Term
from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit, distance_slope
from headscope.kernels.scores import Scores
from headscope.kernels.triton import (
    blocks,
    columns,
    device,
    divergence,
    few_columns,
    few_keys,
    few_lists,
    heaviest,
    listed,
    merge,
    rows,
    shares,
    span_shares,
    targets,
    topk,
)
from headscope.kernels.triton.device import any_length
from headscope.kernels.triton.masks import rules

QUERIES, KEYS, HEADS, KV_HEADS, BATCH = 256, 256, 8, 2, 2
DTYPES = ("float16", "bfloat16", "float32")


class NoCard:
    """A driver that knows what to compile for, and nothing else."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


class Compiled:
    """In a kernel's place: compiles what it would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel.warmup(*map(any_length, args), grid=grid, **options)


def calls(mask: Mask, width: int, d_value: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel under ``mask``, by name; heads are ``width`` wide."""
    q = torch.zeros(BATCH, HEADS, QUERIES, width, dtype=dtype)
    k = torch.zeros(BATCH, KV_HEADS, KEYS, width, dtype=dtype)
    v = torch.zeros(BATCH, KV_HEADS, KEYS, d_value, dtype=dtype)
    f, lse = torch.zeros(KEYS, 16, dtype=dtype), torch.zeros(BATCH, HEADS, QUERIES)
    plain: dict[str, Any] = {"scale": 0.1, "softcap": None, "bias": None}
    every = frozenset({"lse", "entropy", "distance", "linear"})

    def by_rows(
        wants: frozenset[str], values: Tensor | None, features: Tensor | None, few: bool = False
    ) -> Callable[[], Any]:
        some = q[:, :, :1] if few else q
        sizes = rows.Sizes(HEADS, HEADS // KV_HEADS, some.shape[2], KEYS, 0 if features is None else 16)
        shape: dict[str, Any] = {"sizes": sizes, "mask": mask, "positions": None, "wants": wants}
        return lambda: rows.rows(some, k, values, features, None, **shape, **plain)

    yield "rows: lse, entropy", by_rows(frozenset({"lse", "entropy"}), None, None)
    yield "rows", by_rows(every, None, f)
    yield "output", by_rows(frozenset({"output"}), v, None)
    yield "output, lse, entropy", by_rows(frozenset({"output", "lse", "entropy"}), v, None)
    yield "fused", by_rows(every | {"output"}, v, f)
    yield "rows, float32 features", by_rows(every, None, f.float())
    yield "one query", by_rows(every | {"output"}, v, f, few=True)
    seen, sizes = rules(mask, BATCH), columns.Sizes(HEADS, HEADS // KV_HEADS, QUERIES, 0, QUERIES, KEYS)
    sums = torch.zeros(BATCH, HEADS, KEYS)
    yield "columns", lambda: columns.fill(q, k, lse, sums, sums, sizes, seen, **plain)
    yield "top keys", lambda: topk.top_keys(q, k, lse, count=8, mask=mask, **plain)
    yield "top keys, one query", lambda: topk.top_keys(q[:, :, :1], k, lse[:, :, :1], count=8, mask=mask, **plain)
    few = columns.Sizes(HEADS, HEADS // KV_HEADS, QUERIES, 0, 1, KEYS)
    yield "columns, one query", lambda: few_columns.fill(q, k, lse, sums, sums, few, seen, **plain)
    named = torch.zeros(BATCH, QUERIES, 2, dtype=torch.int64)
    yield "targets", lambda: targets.target_mass(q, k, lse, named, mask=mask, **plain)
    outputs = [torch.zeros(BATCH, HEADS, QUERIES, d_value, dtype=dtype) for _ in range(2)]
    yield "shares", lambda: shares.add_shares(outputs, [lse, lse], outputs[0])
    yield "span shares", lambda: span_shares.span_shares(lse, outputs[0], None, torch.zeros(HEADS), BATCH)
    set_of_few = few_keys.Few(torch.zeros(1, HEADS, 16, dtype=torch.int32), lse[..., None].expand(*lse.shape, 16), lse)
    yield "few keys added", lambda: few_keys.add_few(set_of_few, lse, v, lse, outputs[0])
    chosen, scores = torch.zeros(1, HEADS, KEYS, dtype=torch.bool), Scores(q, k, mask, 0.1)
    yield "few keys", lambda: few_keys.few_scores(scores, chosen, 64)
    room, listed_sizes = listed.room(q, 8), heaviest.Sizes(HEADS, HEADS // KV_HEADS, QUERIES, KEYS, 8)
    yield "lists", lambda: listed.heaviest(q, k, lse, room, listed_sizes, seen, device.score(**plain))
    yield "masses of one query", lambda: few_columns.fill(q, k, lse, sums, None, few, seen, padding=True, **plain)
    for top in (8, 32):
        yield f"top {top} masses", partial(few_lists.heaviest, torch.zeros(1, 1, 5000), top, 0)
    chain = _every_term(q)
    edit: dict[str, Any] = {**plain, "edit": chain}
    wants = frozenset({"lse", "entropy"})

    def edited(values: Tensor | None, looked_up: bool = True) -> Callable[[], Any]:
        which = chain if looked_up else distance_slope(torch.ones(HEADS))
        size = rows.Sizes(HEADS, HEADS // KV_HEADS, QUERIES, KEYS)
        shape: dict[str, Any] = {"sizes": size, "mask": mask, "positions": None, "wants": wants, **plain}
        return lambda: rows.rows(q, k, values, None, None, **shape, edit=which)

    yield "edited rows", edited(None)
    yield "edited output", edited(v)
    yield "slope: rows", edited(None, looked_up=False)
    yield "slope: output", edited(v, looked_up=False)
    yield "edited columns", lambda: columns.fill(q, k, lse, sums, sums, sizes, seen, **edit)
    yield "edited columns, one query", lambda: few_columns.fill(q, k, lse, sums, sums, few, seen, **edit)
    yield "edited targets", lambda: targets.target_mass(q, k, lse, named, mask=mask, **edit)
    yield "blocks", lambda: blocks.pooled(q, k, lse, mask=mask, size=64, **plain)
    options: dict[str, Any] = {"mask": mask, "scale": 0.1}
    if width == d_value:
        yield "divergence", lambda: divergence.distances((q, k), (q, k), (lse, lse), (lse, lse), **options)


def _every_term(q: Tensor) -> ScoreEdit:
    """A score edit in which each kind of a term and of its weight stands once."""
    on_rows, on_keys = q.new_ones(BATCH, HEADS, QUERIES).float(), q.new_ones(BATCH, 1, KEYS).float()
    return ScoreEdit.of(
        Term(queries=on_rows, keys=on_keys),
        Term(of="positive", distances=on_rows[:1, :, :20]),
        Term(of="size", keys=on_keys, within=(1, 7)),
        Term(of="score", queries=on_rows, slope=True),
    )


def failures(mask: Mask, width: int, d_value: int, dtype: torch.dtype, names: Sequence[str] = ()) -> list[str]:
    """What does not compile, as lines, of the calls ``names``, or of all."""
    found = []
    for name, compile_ in calls(mask, width, d_value, dtype):
        if names and name not in names:
            continue
        try:
            with redirect_stdout(StringIO()):  # Triton prints what ptxas could not read
                compile_()
        except Exception as error:  # whatever a compiler raises
            found.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Compile what the command line, or ``given`` in its place, asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", default=",".join(kind for kind in MASKS if kind != "rule"))
    parser.add_argument("--widths", default=",".join(f"{d}x{dv}" for d, dv in WIDTHS), help="d_head x d_value")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--calls", default="", help="names as in ``calls``, between semicolons; all by default")
    asked = parser.parse_args(given)
    names = [name for name in asked.calls.split(";") if name]
    driver.set_active(NoCard())
    bad = count = 0
    with ExitStack() as patches:
        patches.enter_context(patch.object(device, "has_copy_engine", lambda _: True))
        for module in (
            rows,
            columns,
            blocks,
            divergence,
            topk,
            few_columns,
            few_keys,
            few_lists,
            heaviest,
            listed,
            shares,
            span_shares,
            targets,
        ):
            patches.enter_context(patch.object(module, "_kernel", Compiled(module._kernel)))
        patches.enter_context(patch.object(topk, "_merge_kernel", Compiled(topk._merge_kernel)))
        patches.enter_context(patch.object(few_keys, "_add_kernel", Compiled(few_keys._add_kernel)))
        patches.enter_context(patch.object(few_lists, "_list_kernel", Compiled(few_lists._list_kernel)))
        patches.enter_context(patch.object(listed, "_anew", Compiled(listed._anew)))
        patches.enter_context(patch.object(rows, "merge_kernel", Compiled(merge.merge_kernel)))
        for kind in asked.rules.split(","):
            for size in asked.widths.split(","):
                for dtype in asked.dtypes.split(","):
                    d, _, dv = size.partition("x")
                    mask = random_mask(kind, BATCH, QUERIES, KEYS)
                    wrong = failures(mask, int(d), int(dv or d), getattr(torch, dtype), names)
                    bad, count = bad + len(wrong), count + 1
                    for line in wrong:
                        print(f"FAILS {kind}, {size}, {dtype}: {line}", flush=True)
    print(f"triton {triton.__version__}: {count} shapes, {bad} kernels do not compile")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
