"""Passes over the scores on the GPU, by rows, by columns, for the heaviest keys: Hopper's kernels, or else Triton's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.kernels.fallback import falls_back
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.masks import Mask
from headscope.kernels.replay import again
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.triton import rows as triton_rows
from headscope.kernels.triton.device import last_dim_contiguous, score
from headscope.kernels.triton.features import decode, encode, width
from headscope.kernels.triton.masks import rules
from headscope.kernels.triton.rows import Rows
from headscope.kernels.triton.tuning import FEWEST_OF_ONE, MOST_OF_ONE, MOST_TOP

# Triton reads the source of every kernel of a file that is imported: what many calls never need is imported by those
# that do, so that a first call waits for nothing else.


def rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    features: Tensor | None = None,
    wants: frozenset[str] = frozenset({"lse"}),
    positions: Tensor | None = None,
    repeat: int = 1,
    within: Tensor | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    edit: ScoreEdit | None = None,
) -> Rows:
    """Row reductions ``wants`` (names of ``Rows``) of ``q`` (batch, head, row, d) over ``k`` (batch, kv_head, key, d).

    ``linear`` are the columns of ``features``, (key, n) or (batch, key, n); the ``output`` needs ``v``. ``positions``
    (row,) ascending absolute positions of the rows, where they are not consecutive from the mask's query offset.

    ``repeat``: so many examples of the mask, the bias and the results, one after the other, are of one example of the
    tensors. ``within`` (batch, head, row): the lse of more keys; the output is then the share of it that these give.
    ``ranges``: which keys ``begin : end`` a query at a position sees, int32 (batch, position) each that never fall from
    one position to the next, beside the mask, which then has no segments.
    ``edit``: a declared one; Hopper's kernels take none.
    """
    v = None if v is None or "output" not in wants else v
    encoded, kept = (None, 0) if features is None else (encode(features, q.dtype), width(features, q.dtype))
    sparse = features is not None and features.dtype == torch.bool  # memberships: of sinks, of spans
    begin, end = ranges or (None, None)
    about = ("rows", scale, softcap, wants, repeat, kept, sparse, *mask.numbers)
    tensors = (q, k, v, encoded, sinks, bias, positions, within, begin, end, *mask.tensors)

    def run() -> tuple[Tensor | None, ...]:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "wants": wants, "repeat": repeat}
        options |= {"kept": kept, "sparse": sparse, "mask": mask, "ranges": ranges, "edit": edit}
        return _rows(q, k, v, encoded, sinks=sinks, bias=bias, positions=positions, within=within, **options)[:-1]

    found = Rows(*(run() if edit is not None else again(run, tensors, about)))  # an edit's tables are no input
    if features is None or found.linear is None:
        return found
    return found._replace(linear=decode(found.linear, features, q.dtype))


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    columns: Tensor | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    wants: frozenset[str],
    positions: Tensor | None,
    repeat: int,
    within: Tensor | None,
    ranges: tuple[Tensor, Tensor] | None,
    edit: ScoreEdit | None,
    kept: int,
    sparse: bool,
) -> Rows:
    """``rows`` of features as ``encode`` gives them, ``kept`` columns of which count; ``sparse``: few keys have any."""
    v = None if v is None else last_dim_contiguous(v)
    q, k = last_dim_contiguous(q), last_dim_contiguous(k)
    sinks = None if sinks is None else sinks.contiguous()
    sizes = triton_rows.Sizes(q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], kept, repeat)
    linear = None if columns is None else kept
    if q.shape[0] * sizes.rows == 0:
        return triton_rows.first(triton_rows.allocate(q, v, wants, linear, 1, repeat))
    if edit is None and hopper.takes(q, k, v, mask=mask, scale=scale, columns=columns):
        filled = triton_rows.first(triton_rows.allocate(q, v, wants, linear, 1, repeat))._replace(within=within)
        seen = rules(mask, q.shape[0] * repeat, positions, ranges)
        with falls_back("Triton's own kernel"):
            hopper.fill_rows(q, k, v, columns, sinks, filled, sizes, seen, score(scale, softcap, bias), sparse=sparse)
            return filled
    return triton_rows.rows(
        q,
        k,
        v,
        columns,
        sinks,
        sizes=sizes,
        mask=mask,
        positions=positions,
        scale=scale,
        softcap=softcap,
        bias=bias,
        wants=wants,
        within=within,
        ranges=ranges,
        edit=edit,
    )


def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    queries: tuple[int, int] | None = None,
    total: bool = True,
    highest: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Sum and maximum over query rows ``queries`` of the pattern, each (batch, head, key) float32 or None.

    ``q`` (batch, head, query, d), ``k`` (batch, kv_head, key, d), ``lse`` (batch, head, query) float32 as ``rows``
    gives it (a sink logit included).
    """
    about = ("columns", scale, softcap, queries, total, highest, *mask.numbers)
    tensors = (q, k, lse, bias, *mask.tensors)

    def run() -> tuple[Tensor | None, ...]:
        given: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias, "edit": edit}
        return _columns(q, k, lse, mask=mask, queries=queries, total=total, highest=highest, **given)

    sums, most = run() if edit is not None else again(run, tensors, about)
    return sums, most


def _columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    queries: tuple[int, int] | None,
    total: bool,
    highest: bool,
    edit: ScoreEdit | None,
    **given: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """``given``: scale, softcap and key bias."""
    from headscope.kernels.triton import columns as triton_columns
    from headscope.kernels.triton import few_columns

    batch, heads, n, _ = q.shape
    keys = k.shape[2]
    sums = torch.empty(batch, heads, keys, device=q.device) if total else None
    most = torch.empty(batch, heads, keys, device=q.device) if highest else None
    if batch == 0 or keys == 0:
        return sums, most
    q, k, lse = last_dim_contiguous(q), last_dim_contiguous(k), lse.contiguous()
    first, stop = queries or (0, n)
    sizes = triton_columns.Sizes(heads, heads // k.shape[1], n, first, stop, keys)
    seen = rules(mask, batch)
    if few_columns.takes(sizes):
        few_columns.fill(q, k, lse, sums, most, sizes, seen, edit=edit, **given)
        return sums, most
    if edit is None and hopper.takes(q, k, None, mask=mask, scale=given["scale"], kernel="columns"):
        with falls_back("Triton's own kernel"):
            hopper.fill_columns(q, k, lse, sums, most, sizes, seen, score(**given))
            return sums, most
    triton_columns.fill(q, k, lse, sums, most, sizes, seen, edit=edit, **given)
    return sums, most


def top_keys(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    count: int,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masses (float32) and positions (int64) of the ``count`` heaviest keys: see ``triton.topk.top_keys``.

    Of one query over ``FEWEST_OF_ONE`` keys or more they take memory for a mass of every key (``triton.few_lists``).
    """
    given: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias}

    def run() -> tuple[Tensor, Tensor]:
        return _top_keys(q, k, lse, mask=mask, count=count, positions=positions, **given)

    tensors, about = (q, k, lse, bias, positions, *mask.tensors), ("top keys", count, scale, softcap, *mask.numbers)
    mass, keys = again(run, tensors, about)
    assert mass is not None and keys is not None
    return mass, keys


def _top_keys(
    q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, count: int, positions: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor]:
    """``given``: scale, softcap and key bias."""
    fits, group = 1 <= count <= MOST_TOP, q.shape[1] // k.shape[1]
    one = positions is None and q.shape[0] > 0 and q.shape[2] == 1 and group <= MOST_OF_ONE
    if fits and one and k.shape[2] >= FEWEST_OF_ONE:
        return _top_of_one(q, k, lse, mask=mask, count=count, **given)
    if fits and hopper.takes(q, k, None, mask=mask, scale=given["scale"], kernel="heaviest"):
        from headscope.kernels.triton import heaviest, listed

        sizes = heaviest.Sizes(q.shape[1], group, q.shape[2], k.shape[2], count)
        seen, numbers = rules(mask, q.shape[0], positions), score(**given)
        with falls_back("Triton's own kernel"):
            room = listed.room(q, count)
            hopper.fill_lists(q, k, room, sizes, seen, numbers)
            return listed.heaviest(q, k, lse, room, sizes, seen, numbers)
    from headscope.kernels.triton import topk

    return topk.top_keys(q, k, lse, count=count, mask=mask, positions=positions, **given)


def _top_of_one(q: Tensor, k: Tensor, lse: Tensor, *, mask: Mask, count: int, **given: Any) -> tuple[Tensor, Tensor]:
    """``_top_keys`` of one query a head, from the masses of all keys."""
    from headscope.kernels.triton import columns as triton_columns
    from headscope.kernels.triton import few_columns, few_lists

    (batch, heads, _, _), keys = q.shape, k.shape[2]
    masses = torch.empty(batch, heads, 1, keys, dtype=torch.float32, device=q.device)
    sizes = triton_columns.Sizes(heads, heads // k.shape[1], 1, 0, 1, keys)
    q, k, lse = last_dim_contiguous(q), last_dim_contiguous(k), lse.contiguous()
    few_columns.fill(q, k, lse, masses, None, sizes, rules(mask, batch), padding=True, **given)
    return few_lists.heaviest(masses, count, mask.key_offset)
