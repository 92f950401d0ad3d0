"""Which calls go to the kernels written for Hopper (``rows``, ``output``, ``columns``, ``heaviest``,
``divergence``).

Triton waits for every matrix product where it issues it. Gluon, Triton's lower level, lets a kernel say when, and which
warps do what: one warp fetches tiles, warp groups of four compute, and one group's exponentials run while the matrix
unit works for another. Heads of 33 to 256 numbers are computed in tiles 64, 128 or 256 wide. All other calls take the
Triton kernels, which compute the same. Without a card, tests run them by ``emulator``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headscope.kernels.first_call import uncollected
from headscope.kernels.masks import Mask

if TYPE_CHECKING:  # all of it needs Triton
    from headscope.kernels.triton import columns as triton_columns
    from headscope.kernels.triton import divergence, heaviest
    from headscope.kernels.triton import rows as triton_rows
    from headscope.kernels.triton.device import Score
    from headscope.kernels.triton.listed import Room
    from headscope.kernels.triton.masks import Rules

KERNELS = ("rows", "output", "columns", "heaviest", "divergence")
NARROWEST, WIDEST = 40, 256  # of a head: below, tiles would be more than half empty
FEWEST = 1024  # queries: with fewer, too few blocks to fill the card
SMALLEST = 1e-6  # scale: what stands for a hidden key's product is divided by it
MOST_COLUMNS = 32  # linear columns that fit beside the scores in registers


def takes(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    mask: Mask,
    scale: float,
    columns: Tensor | None = None,
    kernel: str = "rows",
) -> bool:
    """Whether Hopper's ``kernel`` (with v: ``output``) computes a call over q, k, v; ``columns`` are features."""
    tensors = [x for x in (q, k, v) if x is not None]
    return (
        _on_hopper(q)
        and q.dtype in (torch.float16, torch.bfloat16)
        and NARROWEST <= q.shape[3] <= WIDEST
        and all(x.shape[3] == q.shape[3] and _fetchable(x) for x in tensors)
        and q.shape[2] >= FEWEST
        and (columns is None or (columns.dtype == q.dtype and columns.shape[-1] <= MOST_COLUMNS))
        and scale > SMALLEST
        and mask.rule is None
        and (mask.segments is None or _runs(mask.segments))
        and _is_there(kernel if v is None else "output")
    )


def fill_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    columns: Tensor | None,
    sinks: Tensor | None,
    results: triton_rows.Rows,
    sizes: triton_rows.Sizes,
    seen: Rules,
    score: Score,
    *,
    sparse: bool,
) -> None:
    """Fill ``results`` for a call that ``takes``; ``columns`` are features in q's type, padded to a tile's width.

    ``sparse``: most keys have no feature.
    """
    if v is None:
        from headscope.kernels.hopper import rows as hopper_rows

        hopper_rows.rows(q, k, columns, sinks, results, sizes, seen, score)
    else:
        from headscope.kernels.hopper import output as hopper_output

        hopper_output.output(q, k, v, columns, sinks, results, sizes, seen, score, sparse=sparse)


def fill_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sums: Tensor | None,
    highest: Tensor | None,
    sizes: triton_columns.Sizes,
    seen: Rules,
    score: Score,
) -> None:
    """Fill ``sums`` and ``highest`` for a call that ``takes``."""
    from headscope.kernels.hopper import columns as hopper_columns

    hopper_columns.columns(q, k, lse, sums, highest, sizes, seen, score)


def fill_lists(q: Tensor, k: Tensor, room: Room, sizes: heaviest.Sizes, seen: Rules, score: Score) -> None:
    """Fill ``room`` (``triton.listed``) for a call that ``takes``."""
    from headscope.kernels.hopper import heaviest as hopper_heaviest

    hopper_heaviest.lists(q, k, room, sizes, seen, score)


def fill_distances(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    norms: tuple[Tensor | None, ...],
    out: Tensor,
    sizes: divergence.Sizes,
    seen: Rules,
    score: Score,
) -> None:
    """Fill ``out`` for calls (q, k) and (u, w) that ``takes``; ``norms`` are both lses and what sinks add to each."""
    from headscope.kernels.hopper import divergence as hopper_divergence

    hopper_divergence.distances(q, k, u, w, norms, out, sizes, seen, score)


def _runs(segments: Tensor) -> bool:
    from headscope.kernels.triton.masks import segment_bounds

    return segment_bounds(segments)[2]


def _fetchable(x: Tensor) -> bool:
    """Whether Hopper's copy engine can address ``x``: contiguous rows, every other stride a multiple of 16 bytes."""
    steps = [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])]
    return x.numel() > 0 and x.stride(-1) == 1 and all(step % 16 == 0 and step > 0 for step in steps)


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and find_spec("triton.experimental.gluon") is not None


def works_on(device: torch.device) -> bool:
    """Whether ``device``, a GPU, is a Hopper card and this Triton has the Gluon that the kernels are written in."""
    return _is_hopper(device) and all([_is_there(kernel) for kernel in KERNELS])


@cache
def _is_there(kernel: str) -> bool:
    """Whether this Triton has the Gluon that ``kernel`` is written in: only its file is read, for the first call."""
    try:
        with uncollected():
            import_module(f"headscope.kernels.hopper.{kernel}")
    except Exception:  # Gluon is experimental: another version may name things otherwise
        return False
    return True
