"""What attention computed with in one run, kept so that another run can be held against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention import AttentionCall, Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.verify import verify_once


class Kept(Handler):
    """The queries and keys of one run, of every pass and layer, after any edits; values are not kept."""

    def __init__(self, layers: Sequence[int] | None = None, device: torch.device | str | None = None) -> None:
        self.layers, self.device = None if layers is None else frozenset(layers), device
        self._calls: dict[tuple[str, int, int], AttentionCall] = {}

    def __repr__(self) -> str:
        return f"Kept({len(self._calls)} calls)"

    def concerns(self, site: str, layer: int) -> bool:
        """The kept layers."""
        return self.layers is None or layer in self.layers

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Keep the call, whose edits are done."""
        if self.concerns(call.site, call.layer):
            at = call.site, call.layer, call.mask.query_offset
            if at in self._calls:
                raise HeadscopeError(
                    f"layer {call.layer} of {call.site} attends at position {at[2]} once more: keep one prompt, with "
                    "what continues its cache, in a block"
                )
            # clones: a cache may write into its keys again
            key = call.key.detach().to(self.device, copy=True) if self.device else call.key.detach().clone()
            query = call.query.detach().to(self.device, copy=True) if self.device else call.query.detach().clone()
            self._calls[at] = call.with_(query=query, key=key, value=key)
        return z

    def like(self, call: AttentionCall) -> AttentionCall:
        """What was kept of the same layer and positions, on the device of ``call``.

        Raises:
            HeadscopeError: nothing was, or of other examples, queries, keys, or other padding.
        """
        found = self._calls.get((call.site, call.layer, call.mask.query_offset))
        where = f"layer {call.layer} of {call.site} at position {call.mask.query_offset}"
        if found is None:
            raise HeadscopeError(f"nothing was kept of {where}; keep and trace the same layers and passes")
        sizes = [(*x.query.shape[:3], x.key.shape[2]) for x in (found, call)]
        if sizes[0] != sizes[1] or not _same_padding(found, call):
            raise HeadscopeError(
                f"{where} attends with (example, head, query, key) of {sizes[1]}, but {sizes[0]} were kept, or with "
                "other padding; give both runs texts of the same tokens' number, padded alike"
            )
        key = found.key.to(call.key.device)
        return found.with_(query=found.query.to(call.query.device), key=key, value=key)


def _same_padding(one: AttentionCall, other: AttentionCall) -> bool:
    return _equal(one.mask.start, other.mask.start) and _equal(one.mask.end, other.mask.end)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.cpu(), b.cpu())


@contextmanager
def keep_attention(
    model: Any, *, layers: Sequence[int] | None = None, device: torch.device | str | None = None
) -> Iterator[Kept]:
    """Keep the queries and keys of the run inside the block, for ``statistics.Divergence`` of a later run from it.

    Memory is theirs: 2 x (head + kv_head) x d_head bytes a token and layer in half precision. ``layers``: which (all by
    default). ``device``: where to keep them, such as ``"cpu"``; by default where they are.

    Raises:
        HeadscopeError: an architecture that cannot be traced exactly, or two prompts in one block.
    """
    verify_once(model)
    kept = Kept(layers, device)
    with attached(model, kept), torch.no_grad():
        yield kept
