"""One handler for all patching: reads and replaces q, k, v and z of heads and the residual stream, at any layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import PLACES, StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts
from headscope.interp.results.headset import HeadSet

Place = tuple[str, int]  # ("z", 3): the site, the layer
Change = Callable[[Tensor], Tensor]
INPUTS = {"q": "query", "k": "key", "v": "value"}
COMPONENTS = (*INPUTS, "z")


class Places(Handler):
    """Keeps what passes the sites ``keep``, each *before* its change, in ``kept``, and then makes ``changes``.

    Sites: ``q``, ``k``, ``v`` (row, head, token, d_head) after position embedding and QK-norm, ``z`` (row, head, token,
    d_value), and the places of the residual stream (row, token, d_model). Heads are query heads: where several share
    keys and values, each is shown its own copy, so that a change reaches one head alone.
    """

    def __init__(self, changes: Mapping[Place, Change] | None = None, keep: Iterable[str] = ()) -> None:
        self.changes, self.keep = dict(changes or {}), frozenset(keep)
        self.kept: dict[Place, Tensor] = {}
        used = {site for site, _ in self.changes} | self.keep
        if unknown := sorted(used - {*COMPONENTS, *PLACES}):
            raise HeadscopeError(f"no site {unknown[0]!r}: name one of {', '.join((*COMPONENTS, *PLACES))}")
        self.streams = tuple(place for place in PLACES if place in used)

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Change q, k and v."""
        changed = any((site, call.layer) in self.changes for site in INPUTS)
        if not changed and not self.keep & set(INPUTS):
            return call
        new = {INPUTS[site]: self._pass(site, call.layer, x) for site, x in by_head(call).items()}
        return call.with_(**new) if changed else call

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Change z."""
        return self._pass("z", call.layer, z)

    def stream(self, call: StreamCall) -> Tensor:
        """Change the residual stream."""
        return self._pass(call.place, call.layer, call.x)

    def _pass(self, site: str, layer: int, x: Tensor) -> Tensor:
        if site in self.keep:
            self.kept[site, layer] = x
        change = self.changes.get((site, layer))
        return x if change is None else change(x)


def some_heads(heads: Any, layers: int, width: int) -> HeadSet | None:
    """Heads as a set of a model of ``layers`` x ``width``; None, which stands for all of them, stays None.

    Raises:
        HeadscopeError: an empty set, which would pass for all or for none, or a head that does not exist.
    """
    if heads is None:
        return None
    chosen = HeadSet.of(heads)
    if not len(chosen):
        raise HeadscopeError("no heads were given: name some, such as 'L3H2', or leave heads out for all of them")
    chosen.check(layers, width)
    return chosen


def by_head(call: AttentionCall) -> dict[str, Tensor]:
    """q, k and v (row, head, token, d) of every query head: keys and values that heads share are repeated."""
    heads, held = call.query.shape[1], {site: getattr(call, name) for site, name in INPUTS.items()}
    return {site: x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for site, x in held.items()}


def put(source: Tensor, where: Tensor, copies: int, members: Sequence[tuple[int, int | None]]) -> Change:
    """A change that gives, in the named copies, one head (None: all of the site) the values of ``source`` at ``where``.

    Args:
        source: (example, head, token, d) or (example, token, d).
        where: bool (example, token).
        copies: of the examples in a pass.
        members: (copy, head) each.
    """

    def change(x: Tensor) -> Tensor:
        new = x.clone().view(copies, -1, *x.shape[1:])  # (copy, example, ...)
        given, held = source.to(x.device, x.dtype), where.to(x.device)[..., None]
        for copy, head in members:
            if head is not None:
                new[copy, :, head] = torch.where(held, given[:, head], new[copy, :, head])
            elif given.ndim == 4:
                new[copy] = torch.where(held[:, None], given, new[copy])
            else:
                new[copy] = torch.where(held, given, new[copy])
        return new.flatten(0, 1)

    return change


def in_turn(changes: Sequence[Change]) -> Change:
    """One change after the other."""

    def change(x: Tensor) -> Tensor:
        for one in changes:
            x = one(x)
        return x

    return change


def layers_of(kept: Mapping[Place, Tensor], site: str) -> list[int]:
    """The layers that a site was kept in."""
    return sorted(layer for name, layer in kept if name == site)


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """``items`` in order, ``size`` at a time.

    Raises:
        HeadscopeError: a size below 1.
    """
    check_counts(1, together=size)
    return [items[first : first + size] for first in range(0, len(items), size)]


def in_window(middle: int, layer: int, width: int) -> bool:
    """Whether ``layer`` is one of ``width`` around ``middle``; of an even number one more lies below it."""
    return middle - width // 2 <= layer < middle - (-width // 2)
