"""The rows of ``corners`` in the order in which they are timed, and other tiles of their kernels.

Tiles that were swept and lost are in ``results/h200-tiles.json``, the sweep's part of a run of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from headscope.kernels.benchmarks.corner_rows import (
    Timed,
    apart,
    biased,
    capped,
    decode,
    edited,
    host,
    looked_up,
    maps,
    moved,
    narrow,
    packed,
    single,
    split,
    top,
    width,
)
from headscope.kernels.triton import tuning
from headscope.kernels.triton.tuning import Tiles


@dataclass(frozen=True)
class Row:
    """Measurements that share tensors."""

    key: str
    name: str
    make: Callable[[int], Iterator[Timed]]


@dataclass(frozen=True)
class Sweep:
    """Other settings of a row's kernel: what ``module.name`` is to return while ``what`` is timed."""

    row: str
    what: tuple[str, ...]
    module: Any
    name: str
    settings: list[Any]


ROWS = [
    Row("80", "d_head 80, 16k", partial(width, 80, (0.73, 1.48, 0.64), (0.58, 1.00, 0.55))),
    Row("256", "d_head 256, 16k", partial(width, 256, (0.81, 2.51, 0.79), (0.50, 1.00, 0.50))),
    Row("96", "d_head 96, 16k", partial(width, 96, (0.73, 1.48, 0.64), (0.58, 1.00, 0.55))),
    Row("128", "d_head 128, 16k (as before)", partial(width, 128, (0.57, 0.99, 0.54), (0.58, 1.00, 0.55))),
    Row("f64", "float32, d 64, 8k", partial(single, 64)),
    Row("f128", "float32, d 128, 8k", partial(single, 128)),
    Row("packed", "packed in 8, 16k", packed),
    Row("cap", "softcap 50, d 128, 16k", partial(capped, 128)),
    Row("bias", "key bias, 16k", biased),
    Row("maps", "block map from lse, 16k", maps),
    Row("div128", "divergence, d 128, 16k", partial(apart, 128, 5.1, 2.2)),
    Row("div256", "divergence, d 256, 16k", partial(apart, 256, 8.0, 2.4)),
    Row("moved", "moved mass, 16k", moved),
    Row("4 spans", "span outputs, 16k", partial(split, 16384, 4, 2.6, 1.3)),
    Row("16 spans", "span outputs, 16k", partial(split, 16384, 16, 11.0, 1.6)),
    Row("2k spans", "span outputs, 2k", partial(split, 2048, 4, 28.0, 2.0)),
    Row("narrow", "d_head 64, 64k", narrow),
    Row("top 2k", "top 16 from lse, 2k", partial(top, 2048, 8.7, 3.0)),
    Row("top 16k", "top 16 from lse, 16k", partial(top, 16384, 4.1, 1.6)),
    Row("top 64k", "top 16 from lse, 64k", partial(top, 65536, 2.4, 1.4)),
    Row("decode", "decode, 131,072 keys, replayed", decode),
    Row("host", "host time of a call, us", host),
    Row("cap256", "softcap 50, d 256, 16k", partial(capped, 256)),
    Row("edit", "score edit, 16k", edited),
    Row("table", "score edit by distance, 16k", looked_up),
]
EDITED = [Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2)]
EDITED_OUTPUT = [Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2)]
EDITED_COLUMNS = [Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 2)]
LOOKED_UP = [Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 128, 8, 2)]
BOTH = "with output, statistics"
SWEEPS = [
    Sweep("edit", ("statistics",), tuning, "edited_row_tiles", EDITED),
    Sweep("edit", ("output", BOTH), tuning, "edited_row_tiles", EDITED_OUTPUT),
    Sweep("edit", ("columns",), tuning, "edited_column_tiles", EDITED_COLUMNS),
    Sweep("table", ("statistics", BOTH), tuning, "edited_row_tiles", LOOKED_UP),
    Sweep("table", ("columns",), tuning, "edited_column_tiles", EDITED_COLUMNS),
]
