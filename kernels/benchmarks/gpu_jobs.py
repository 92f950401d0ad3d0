"""Which calls ``gpu_groups`` checks on the card, in named groups."""

from __future__ import annotations

from typing import Any

import torch

from headscope.kernels.benchmarks import gpu_check, gpu_check_edits
from headscope.kernels.checks.cases import MASKS, WIDTHS, paddings
from headscope.kernels.hopper import columns as hopper_columns
from headscope.kernels.hopper import heaviest as hopper_heaviest
from headscope.kernels.hopper import output as hopper_output
from headscope.kernels.hopper import rows as hopper_rows
from headscope.kernels.triton import columns as triton_columns
from headscope.kernels.triton import heaviest as triton_heaviest
from headscope.kernels.triton import rows as triton_rows
from headscope.kernels.triton import tuning

KERNELS = {
    "triton rows": triton_rows,
    "triton columns": triton_columns,
    "triton top keys": triton_heaviest,
    "hopper rows": hopper_rows,
    "hopper output": hopper_output,
    "hopper columns": hopper_columns,
    "hopper top keys": hopper_heaviest,
}
RULES = [kind for kind in MASKS if kind != "rule"]  # streaming's
DTYPE = torch.bfloat16
Job = tuple[str, dict[str, Any]]


BASE: dict[str, Any] = {"queries": 333, "keys": 333, "dtype": DTYPE}


def groups() -> dict[str, list[Job]]:
    """Jobs by group, the quick groups first."""
    return _quick() | _thorough()


def _quick() -> dict[str, list[Job]]:
    """A few calls of every kernel."""
    base = BASE
    return {
        "Hopper's widths and options": [("narrow", spec) for spec in _wide()],
        "float32": [
            ("narrow", {**base, "kind": kind, "d_head": d, "dtype": torch.float32})
            for d in (64, 80, 128, 256)
            for kind in ("causal", "left padding")
        ],
        "maps and divergences": [
            ("pairs", {**base, "kind": kind, "d_head": d, **options})
            for d, kind, options in (
                (128, "causal", {}),
                (64, "window", {"sinks": True, "softcap": 5.0}),
                (256, "left padding", {}),
                (128, "segments", {"dtype": torch.float32}),
                (128, "causal", {"queries": 1100, "keys": 1100}),
                (64, "window", {"queries": 1100, "keys": 1100, "sinks": True, "softcap": 5.0}),
                (256, "left padding", {"queries": 1100, "keys": 1100}),
            )
        ],
        "moved mass and spans": [
            ("moves", {**base, "kind": "causal", "d_head": 128, "queries": 1100, "keys": 1100, "move": "onto a set"}),
            (
                "moves",
                {**base, "kind": "window", "d_head": 64, "queries": 1100, "keys": 1100, "move": "lost to the row"},
            ),
            (
                "moves",
                {**base, "kind": "left padding", "d_head": 128, "queries": 1100, "keys": 1100, "move": "no first key"},
            ),
            ("moves", {**base, "kind": "window", "d_head": 80, "keys": 200, "bias": True, "move": "a head's own keys"}),
            ("spans", {**base, "kind": "causal", "d_head": 80, "queries": 1100, "keys": 1100}),
            ("spans", {**base, "kind": "left padding", "d_head": 128, "queries": 1100, "keys": 1100, "sinks": True}),
            ("spans", {**base, "kind": "segments", "d_head": 256, "queries": 1100, "keys": 1100, "bias": True}),
            ("spans", {**base, "kind": "window", "d_head": 64, "softcap": 5.0}),
        ],
        "top keys, few queries": [
            *(
                ("top", {**base, "kind": kind, "d_head": 128, "queries": 900, "keys": 900})
                for kind in ("causal", "segments")
            ),
            ("top", {**base, "kind": "window", "d_head": 64, "softcap": 5.0, "sinks": True, "bias": True}),
            ("top", {**base, "kind": "causal", "d_head": 80, "dtype": torch.float32}),
            ("top", {**base, "kind": "causal", "d_head": 256}),
            ("top", {**base, "kind": "causal", "d_head": 128, "queries": 1100, "keys": 2300}),
            (
                "top",
                {**base, "kind": "window", "d_head": 64, "queries": 1100, "softcap": 5.0, "bias": True},
            ),
            ("top", {**base, "kind": "left padding", "d_head": 256, "queries": 1100, "keys": 1100}),
            *(("same", {**base, "d_head": 64, "queries": n, "keys": n}) for n in (333, 1100)),
            *(
                ("narrow", {**base, "kind": kind, "d_head": d, "queries": n, "keys": 3000, "bias": True})
                for kind, d, n in (("causal", 128, 1), ("window", 64, 3), ("left padding", 256, 2))
            ),
            ("all", {**base, "kind": "causal", "d_head": 128, "queries": 70, "keys": 150, "features": 3}),
        ],
        "edited scores": gpu_check_edits.declared(),
        "calls that come again": [
            ("again", {**base, "kind": kind, "d_head": 128, "queries": n, "keys": 1100})
            for kind in ("causal", "left padding")
            for n in (1, 333, 1100)
        ],
    }


def _thorough() -> dict[str, list[Job]]:
    """Every rule, width and place of padding."""
    base = BASE
    wide = [{**base, "kind": kind, "d_head": d, "d_value": dv} for kind in RULES for d, dv in WIDTHS]
    bare = [spec | {"dtype": torch.float16} for spec in wide if spec["kind"].startswith(("chunks", "segments"))]
    single = [{**base, "kind": kind, "d_head": 128, "dtype": torch.float32} for kind in RULES]
    # widths whose rows the copy engine cannot fetch, beside narrower and wider values
    odd = [
        {**base, "kind": "causal", "dtype": torch.float16, "queries": n, "d_head": d, "d_value": dv}
        for n in (20, 333)
        for d in (17, 33, 65, 129)
        for dv in (8, 17, 24, 31, 40, 72, 136)
    ]
    pads = []
    for d, n in ((64, 333), (80, 333), (128, 333), (64, 1300), (128, 1300)):  # the last two by Hopper's kernels
        by_rows, by_columns = tuning.row_tiles(d, d, 0, torch.bfloat16), tuning.column_tiles(d, torch.bfloat16)
        tiles = {by_rows.rows, by_rows.keys, by_columns.rows, by_columns.keys} if n < 1024 else {64, 128, 384}
        shape = {**base, "d_head": d, "queries": n, "keys": n}
        pads += [shape | {"kind": kind, "padding": pad} for kind in ("full", "causal") for pad in paddings(*tiles)]
    sizes = [
        {**base, "kind": "causal", "dtype": dtype, "size": size, "d_head": d, "queries": n, "keys": max(n, 333)}
        for dtype in (torch.float16, torch.bfloat16)
        for size in (1.0, 65_520.0, 1e7, 1e-7, 0.0)
        for d, n in ((64, 1), (80, 333), (128, 1100))
    ]
    maps = [
        {**base, "kind": kind, "d_head": 64, "queries": n, "keys": n, "size": size}
        for kind in ("causal", "left padding")
        for n in (333, 3000)
        for size in (7, 16, 24, 100)
    ]
    return {
        "every rule at every width": [("narrow", spec) for spec in wide + bare + single],
        "widths fetched by threads": [("narrow", spec) for spec in odd],
        "padding around the tiles": [("narrow", spec) for spec in pads],
        "features of any size": [("features", spec) for spec in sizes],
        "blocks repeat to the bit": [("blocks", spec) for spec in maps],
        "kernels that do not compile": [("broken", {"name": name}) for name in [*KERNELS, "too large tiles"]],
        "Hopper's kernels": [("all", spec) for spec in gpu_check.for_hopper()],
        "every branch": [("all", spec) for spec in gpu_check.cases() if spec not in gpu_check.for_hopper()],
        "top keys, spans, edits, moves": gpu_check_edits.jobs(),
    }


def _wide() -> list[dict[str, Any]]:
    """Calls of Hopper's kernels at widths that fill no tile or a wider one, and of what else they take."""
    base: dict[str, Any] = {"dtype": DTYPE, "queries": 1100, "keys": 1300}
    every = [{**base, "kind": kind, "d_head": d} for d in (80, 256) for kind in ("causal", "window", "segments")]
    every += [{**base, "kind": "causal", "d_head": d} for d in (40, 96, 192)]
    for d in (64, 128, 256):
        every += [
            {**base, "kind": "causal", "d_head": d, "softcap": 5.0, "sinks": True},
            {**base, "kind": "left padding", "d_head": d, "bias": True},
        ]
    every += [{**base, "kind": kind, "d_head": d} for d in (64, 128) for kind in ("segments", "chunks from origin")]
    every += [{**base, "kind": "causal", "d_head": d, "bias": True, "keys": 4200} for d in (64, 128)]  # by products
    return [{**spec, "batch": 2, "kv_heads": 1} for spec in every]
