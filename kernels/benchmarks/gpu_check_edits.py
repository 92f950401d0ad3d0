"""Jobs of ``gpu_groups``: top keys, span outputs, edited scores and moved mass against the definition, twice.

FlexAttention has to compile the calls that it should.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from headscope.kernels import attention, flex
from headscope.kernels import gpu_engine as triton_engine
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case, random_edits, random_moves
from headscope.kernels.checks.compare import allowed, compare, distance, tensors
from headscope.kernels.redistribute import redistribute
from headscope.kernels.request import Columns, Reduced, Request
from headscope.kernels.spans import span_outputs

DEVICE = "cuda"
LIMIT = 300  # seconds, after which a call counts as hanging
Job = tuple[str, dict[str, Any]]


def jobs() -> list[Job]:
    """Checks with their calls: each mask, dtype, awkward width and logit option; one, few and many queries."""
    options = {"softcap": 5.0, "sinks": True, "bias": True}
    base: dict[str, Any] = {"dtype": torch.bfloat16, "d_head": 64, "queries": 333, "keys": 333}
    kinds = [kind for kind in MASKS if kind != "rule"]
    top = [{**base, "kind": kind} for kind in kinds] + [{**base, "kind": "causal", **options}]
    for d in (16, 60, 80, 96, 128, 256):
        top.append({**base, "kind": "causal", "d_head": d, "queries": 63, "keys": 457})
    top += [{**base, "kind": kind, "queries": 1, "keys": 3000, **options} for kind in ("causal", "window")]
    top += [{**base, "kind": kind, "queries": 1, "keys": 6000, **options} for kind in ("right padding", "segments")]
    top.append({**base, "kind": "causal", "batch": 1, "queries": 1, "keys": 100_000, "d_head": 128})
    top.append({**base, "kind": "causal", "batch": 1, "queries": 2000, "keys": 2000, "d_head": 128})
    for dtype in (torch.float16, torch.float32):
        top += [
            {**base, "kind": kind, "dtype": dtype, "queries": n} for kind in ("causal", "segments") for n in (5, 333)
        ]
    spans = [{**base, "kind": kind} for kind in ("causal", "left padding", "chunks")]
    spans += [{**base, "kind": "causal", "dtype": torch.float32, **options}]
    edits = [{**base, "kind": kind, "edit": "bounded scores"} for kind in MASKS]
    edits += [{**base, "kind": "causal", "edit": name, **options} for name in _names(random_edits)]
    for d, dv in ((60, 60), (128, 64), (256, 256)):
        edits.append({**base, "kind": "causal", "d_head": d, "d_value": dv, "keys": 400, "edit": "a function's table"})
    edits.append({**base, "kind": "window", "dtype": torch.float16, "edit": "key scale"})
    moves = [{**base, "kind": kind, "move": "onto a set"} for kind in kinds]
    moves += [{**base, "kind": "causal", "move": name, **options} for name in _names(random_moves)]
    moves.append({**base, "kind": "causal", "d_head": 128, "queries": 2000, "keys": 2000, "move": "no first key"})
    listed = [("moves", spec) for spec in moves]
    listed += (
        [("edits", spec) for spec in edits] + [("top", spec) for spec in top] + [("spans", spec) for spec in spans]
    )
    return listed


def declared() -> list[Job]:
    """Calls with declared edits, which Triton's kernels compute: each edit, mask and width, few queries, float32."""
    options = {"softcap": 5.0, "sinks": True, "bias": True}
    base: dict[str, Any] = {"dtype": torch.bfloat16, "d_head": 128, "queries": 333, "keys": 333, "kind": "causal"}
    few = random_case("causal", queries=3, keys=3)
    names = [name for name, edit in random_edits(few).items() if edit.in_kernels]
    calls = [{**base, "edit": name} for name in names]
    calls += [{**base, "edit": "every term", "kind": kind} for kind in MASKS if kind != "rule"]
    for d, dv in ((60, 60), (64, 64), (80, 80), (96, 128), (128, 64), (256, 256)):
        size = {"d_head": d, "d_value": dv, "queries": 63}
        calls += [{**base, **size, "edit": name} for name in ("every term", "distance slope")]
    for n in (1, 3, 1100):
        calls += [{**base, "edit": "every term", "queries": n, "keys": 3000, **options}]
        calls += [{**base, "edit": "distance slope", "queries": n, "keys": 3000, "d_head": 64}]
    kinds = (torch.float16, torch.float32)
    calls += [{**base, "edit": "every term", "dtype": dtype, "whole": True, **options} for dtype in kinds]
    return [("declared", spec) for spec in calls]


def _names(kinds: Callable[[Case], dict[str, Any]]) -> list[str]:
    return list(kinds(random_case("causal", queries=3, keys=3)))


def _twice(label: str, case: Case, run: Callable[..., Reduced], request: Request) -> list[str]:
    got, again = case.run(run, request), case.run(run, request)
    wrong = [f"{label}: {verdict}" for verdict in compare(got, case, request) if not verdict.holds]
    for name, x in tensors(got).items():
        if not torch.equal(x, tensors(again)[name]):
            wrong.append(f"{label}: {name} differs between two runs")
    return wrong


def check_top(spec: dict[str, Any]) -> list[str]:
    """Lists of one, of eight and of 32 keys, of all rows and of some."""
    case = random_case(**spec, device=DEVICE)
    rows = torch.arange(0, case.q.shape[2], 3, device=DEVICE)
    asked = [(1, None), (8, rows), (32, None)]
    return [
        line
        for top, some in asked
        for line in _twice(
            f"top {top} {spec}", case, triton_engine.attend, Request(output=False, top=top, query_rows=some)
        )
    ]


def check_equal(spec: dict[str, Any]) -> list[str]:
    """Lists of equal scores, which have no room beside one another: any keys will do, none of them twice."""
    case = random_case("causal", **spec, device=DEVICE)
    case = replace(case, q=torch.zeros_like(case.q))
    wrong = _twice(f"equal scores {spec}", case, triton_engine.attend, Request(output=False, top=16))
    keys = case.run(triton_engine.attend, Request(output=False, top=16)).top_keys
    assert keys is not None
    twice = (keys[:, :, 16:].sort(-1).values.diff(dim=-1) == 0).any()
    return [*wrong, f"equal scores {spec}: a key is listed twice"] if twice else wrong


def check_spans(spec: dict[str, Any]) -> list[str]:
    """Overlapping spans, other ones in each example; spans that cut up the keys; and from a known lse."""
    case = random_case(**spec, device=DEVICE)
    keys = case.k.shape[2]
    over = torch.tensor([[[0, keys], [7, 150], [100, 300]], [[0, 4], [200, 201], [180, keys]]], device=DEVICE)
    cuts = torch.tensor([[[0, 100], [100, 107], [107, keys]], [[200, keys], [0, 0], [0, 200]]], device=DEVICE)
    lse = attention.attend(case, case.v, request=Request(output=False, lse=True)).lse
    given = ((over, None), (cuts, None), (cuts, lse))
    return [line for spans, norm in given for line in _spans_apart(spec, case, spans, norm)]


def _spans_apart(spec: dict[str, Any], case: Case, spans: torch.Tensor, lse: torch.Tensor | None) -> list[str]:
    got, wrong = span_outputs(case, case.v, spans, lse=lse), []
    exact, low = case.pattern(), case.pattern(case.q.dtype).double()
    v = case.v.double().repeat_interleave(exact.shape[1] // case.v.shape[1], 1)
    for b in range(2):
        for n, (start, stop) in enumerate(spans[b].tolist()):
            want, lossy = (p[b, :, :, start:stop] @ v[b, :, start:stop] for p in (exact, low))
            error = distance(got.output[b, :, :, n], want)
            # each segment of a span is rounded to the values' dtype, as the eager output is once
            limit = allowed(lossy.to(case.v.dtype), want, size=case.score_size())
            if not error <= limit:
                wrong.append(f"span {start}:{stop} of {spec}: off by {error}, allowed {limit}")
            mass = exact[b, :, :, start:stop].sum(-1)
            error, limit = distance(got.mass[b, :, :, n], mass), allowed(low[b, :, :, start:stop].sum(-1), mass)
            if not error <= limit:
                wrong.append(f"mass of span {start}:{stop} of {spec}: off by {error}, allowed {limit}")
    return wrong


def check_edits(spec: dict[str, Any]) -> list[str]:
    """The output and lse by FlexAttention's compiled kernel, beside a statistic by streaming, whatever the edit is."""
    spec = dict(spec)
    name = spec.pop("edit")
    case = random_case(**spec, device=DEVICE)
    case = replace(case, edit=random_edits(case)[name])
    if not flex.takes(case.q, case.v):
        return [f"FlexAttention does not take {spec}"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        request = Request(lse=True, entropy=True, columns=(Columns(sum=True),))
        wrong = _twice(f"{name} {spec}", case, flex.attend, request)
    return wrong + [f"{name} {spec}: {x.message}" for x in said if "does not compile" in str(x.message)]


def check_declared(spec: dict[str, Any]) -> list[str]:
    """Declared edits by Triton's kernels alone: rows, the output and columns; ``whole``: everything but top keys, of
    all rows and of some."""
    spec = dict(spec)
    name, whole = spec.pop("edit"), spec.pop("whole", False)
    case = random_case(**spec, device=DEVICE)
    case = replace(case, edit=random_edits(case)[name])
    asked = [Request(lse=True, entropy=True, columns=(Columns(sum=True, max=True),))]
    if whole:
        asked = [everything(case, subset=subset, top=0) for subset in (False, True)]
    with patch("headscope.kernels.gpu_engine.streaming.attend", side_effect=AssertionError("streaming was asked")):
        return [line for request in asked for line in _twice(f"{name} {spec}", case, attention.attend, request)]


def check_moves(spec: dict[str, Any]) -> list[str]:
    """Everything of a redistributed pattern, of all rows and of some; what scattered sets are gathered for, and the
    output alone, for which few keys need no pass."""
    spec = dict(spec)
    name = spec.pop("move")
    case = random_case(**spec, device=DEVICE)
    case = replace(case, move=random_moves(case)[name])
    asked = [everything(case, subset=subset) for subset in (False, True)]
    asked += [Request(lse=True, max=True, entropy=True), Request(lse=True)]
    return [line for request in asked for line in _twice(f"{name} {spec}", case, redistribute, request)]


CHECKS = {
    "top": check_top,
    "spans": check_spans,
    "edits": check_edits,
    "declared": check_declared,
    "moves": check_moves,
}
