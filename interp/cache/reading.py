"""What a policy decides by: one layer's call, in which the prompt was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.rotary import Rotation
from headscope.kernels.request import Columns, Request


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer's attention over a prompt, which begins with the call's first row; later tokens may follow in the call.

    ``stop`` (batch,): where each example's prompt ends, as an index of rows and keys. ``measured = (first, stop)``: the
    rows in which the loss is measured, where they are in the call (only an oracle may look). ``rotation``: how the
    layer turns queries and keys. ``ahead`` (batch, head, n, d_head): queries of n tokens that were appended to the
    prompt for a policy that asks for them. ``carried``: what the policy itself left at earlier layers of this text, by
    layer.

    Raises:
        HeadscopeError: no prompt can be told: cross-attention, packed sequences, padding between tokens, a pass that
            continues a cache, or mass moved after softmax.
    """

    call: AttentionCall
    stop: Tensor
    measured: tuple[int, int] | None = None
    rotation: Rotation | None = None
    ahead: Tensor | None = None
    carried: dict[int, Tensor] = field(default_factory=dict)
    _received: dict[tuple[tuple[int, ...], ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        call = self.call
        mask = call.mask
        if call.cross or call.gaps or mask.segments is not None or call.redistribution is not None:
            raise HeadscopeError(
                f"layer {call.layer} of {call.module}: keys are kept in self-attention of one sequence an example, "
                "whose mass no edit moves after softmax; not in cross-attention, packed sequences or a mask with gaps"
            )
        if mask.query_offset or mask.key_offset:
            raise HeadscopeError("keys are chosen over the whole prompt: read it in one pass, not in pieces")

    @cached_property
    def start(self) -> Tensor:
        """The index of each example's first token: (batch,)."""
        start = self.call.mask.start
        return torch.zeros_like(self.stop) if start is None else start.to(self.stop).expand_as(self.stop)

    @cached_property
    def count(self) -> Tensor:
        """Tokens of each prompt: (batch,)."""
        return self.stop - self.start

    @cached_property
    def at(self) -> Tensor:
        """Each key's position from its example's first token: (batch, key)."""
        return torch.arange(self.call.key.shape[2], device=self.stop.device) - self.start[:, None]

    @cached_property
    def keys(self) -> Tensor:
        """The prompt's keys: bool (batch, key)."""
        return (self.at >= 0) & (self.at < self.count[:, None])

    @cached_property
    def real(self) -> Tensor:
        """The call's keys that are tokens, not padding: bool (batch, key)."""
        end = self.call.mask.end
        return self.at >= 0 if end is None else (self.at >= 0) & (self.at < (end.to(self.start) - self.start)[:, None])

    @cached_property
    def scored(self) -> Tensor:
        """Keys in the precision that scores are made in: (batch, kv_head, key, d_head)."""
        key = self.call.key
        return key.to(torch.promote_types(key.dtype, torch.float32))

    def received(self, first: Tensor, stop: Tensor) -> Tensor:
        """Mass that each key gets of the rows from ``first`` to ``stop`` (batch,), summed: (batch, head, key).

        One pass over the keys and those rows alone.
        """
        place = tuple(first.tolist()), tuple(stop.tolist())
        if place not in self._received:
            pairs = list(zip(*place, strict=True))
            ranges = sorted(set(pairs))
            asked = tuple(Columns(pair, sum=True) for pair in ranges)
            sums = [x.sum for x in self.call.attend(Request(output=False, columns=asked)).columns]
            each = [sums[ranges.index(pair)] for pair in pairs]
            self._received[place] = torch.stack([x[b] for b, x in enumerate(each) if x is not None])
        return self._received[place]

    def received_in_prompt(self, last: int | None = None) -> Tensor:
        """The same of the prompt's rows, or of the ``last`` of them."""
        first = self.start if last is None else torch.maximum(self.start, self.stop - last)
        return self.received(first, self.stop)

    def by_group(self, x: Tensor) -> Tensor:
        """The mean over the query heads that share a key head: (batch, kv_head, key) of (batch, head, key)."""
        return x.reshape(x.shape[0], self.call.key.shape[1], -1, x.shape[-1]).mean(2)
