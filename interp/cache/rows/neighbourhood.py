"""Generalised neighbourhood attention: windows that move by a stride and may be dilated, over one axis or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile

T = TypeVar("T", int, bool)


@dataclass(frozen=True, kw_only=True)
class Neighbourhood(RowPolicy):
    """Every query sees a window of n keys around or before it, which moves by ``stride`` and skips by ``dilation``.

    The mask of generalised neighbourhood attention along a text (Hassani et al. 2025, arXiv 2504.16922;
    SHI-Labs/NATTEN @ 8c8729f4, ``backends/flex.py:333-406``), the budget as its window. A stride of 1 and no dilation
    is a sliding window; a stride of the window, blocks. Recall is the mass inside the mask: how local a head is.

    What differs: a text goes on, so that no window is moved or ended by the last token (``gna_mask`` of a given size
    does that), and keys that come after the query stay hidden in causal attention, whatever the window.

    Args:
        stride: tokens whose queries share a window; at most the window.
        dilation: 2 sees every second key, and so on: queries and keys whose positions agree modulo it.
        causal: the window ends at the query; False: it lies around it, and begins at the first token at the earliest.
    """

    name: ClassVar[str] = "neighbourhood"
    unit: ClassVar[str] = "keys"
    source: ClassVar[str] = "Hassani et al. 2025, arXiv 2504.16922; SHI-Labs/NATTEN @ 8c8729f4"

    stride: int = 1
    dilation: int = 1
    causal: bool = True

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        self._wide_enough(kept)
        shortest, reach = int(tokens.min()), (kept - 1) * self.dilation + 1
        if self.dilation > 1 and bool((reach > tokens).any()):
            raise HeadscopeError(
                f"{self.name}: {int(kept.max())} keys at a dilation of {self.dilation} reach over {int(reach.max())} "
                f"tokens, and a prompt has {shortest}: give a smaller dilation or budget, or longer prompts"
            )
        if self.stride >= shortest:
            raise HeadscopeError(
                f"{self.name}: a stride of {self.stride} reaches over a whole prompt of {shortest} tokens, so that all "
                "queries share one window: give a smaller stride, or longer prompts"
            )

    def _wide_enough(self, kept: Tensor) -> None:
        if bool((kept < self.stride).any()):
            raise HeadscopeError(f"{self.name}: a stride of {self.stride} is more than the window, {int(kept.min())}")

    def shows(self, query: Tensor, key: Tensor, kept: Tensor) -> Tensor:
        self._wide_enough(kept)
        return _seen(query, key, kept, self.stride, self.dilation, self.causal) & (key <= query)

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        kept = budget.count(reading.count)[:, None, None, None]

        def shown(tile: Tile) -> Tensor:
            query, key = reading.at[:, None, tile.rows, None], reading.at[:, None, None, tile.keys]
            return self.shows(query, key, kept) & (key >= 0)

        return shown


def _seen(
    query: Tensor, key: Tensor, window: Tensor | int, stride: int, dilation: int, causal: bool, size: int | None = None
) -> Tensor:
    """Whether queries see keys by their places on one axis, of ``size`` places or without end."""
    group = query % dilation
    i, j = query // dilation, key // dilation
    leader = i // stride * stride + (stride - 1 if causal else stride // 2)
    last = None if size is None else (size - group + dilation - 1) // dilation - 1  # place within the query's group
    leader = leader if last is None else torch.minimum(leader, last)
    same = key % dilation == group
    if causal:
        return same & (j <= i) & (leader - j < window)
    left, right = window // 2, (window + 1) // 2 - 1
    centre = torch.maximum(leader, torch.as_tensor(left, device=leader.device))
    centre = centre if last is None else torch.minimum(centre, last - right)
    return same & (j >= centre - left) & (j <= centre + right)


def gna_mask(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Which places of a grid see which: bool (query, key), both in the order of rows, with as many as the grid has.

    Along an axis of size x, places that agree modulo the dilation are a group. In a group of x' places, with i = place
    // dilation: the leader is m = min(i // stride * stride + stride // 2, x' - 1) and the window of w places has its
    centre at m, moved inward where it would leave the axis, so that every query sees w keys; causal, m = min(i //
    stride * stride + stride - 1, x' - 1), and keys j <= i with m - j < w are seen. Axes are combined by "and" (NATTEN,
    see ``Neighbourhood``). What a call's mass inside it is, ``kernels.kept.losses`` says of ``[lambda tile:
    mask[tile.rows, tile.keys]]``.

    Args:
        shape: places along each axis, ``(24, 24)``; a number for one axis.
        window, stride, dilation, causal: one value for all axes, or one each.

    Raises:
        HeadscopeError: another number of values than of axes, a stride above its window, or a dilated window that is
            longer than its axis.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    axes = zip(
        sizes,
        _each(window, sizes, "window"),
        _each(stride, sizes, "stride"),
        _each(dilation, sizes, "dilation"),
        _each(causal, sizes, "causal"),
        strict=True,
    )
    mask = torch.ones(1, 1, dtype=torch.bool)
    for x, w, s, d, ends in axes:
        if not (1 <= s <= w and d >= 1 and w * d <= x):
            raise HeadscopeError(
                f"an axis of {x} takes a window of 1 to {x}, a stride of 1 to the window, and window * dilation up to "
                f"{x}; got window={w}, stride={s}, dilation={d}"
            )
        at = torch.arange(x)
        mask = torch.kron(mask.int(), _seen(at[:, None], at[None, :], w, s, d, ends, x).int()).bool()
    return mask


def _each(given: T | Sequence[T], sizes: tuple[int, ...], name: str) -> tuple[T, ...]:
    """One value an axis."""
    found = (given,) * len(sizes) if isinstance(given, int) else tuple(given)
    if len(found) != len(sizes) or not sizes:
        raise HeadscopeError(f"gna_mask: {name} has {len(found)} values for {len(sizes)} axes: give one, or one each")
    return found
