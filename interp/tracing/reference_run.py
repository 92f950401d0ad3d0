"""What attention computed with in one run, kept so that another run can be held against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.kernels.request import Reduced, Request

_Place = tuple[str, int, int]  # module, layer, position of the first query


class ReferenceRun(Handler):
    """The queries and keys of one run, of every pass and layer, after any edits; values are not kept."""

    only_reads = True

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = device
        self._calls: dict[_Place, AttentionCall] = {}
        self._pass: dict[_Place, AttentionCall] = {}

    def __repr__(self) -> str:
        return f"ReferenceRun({len(self._calls)} calls)"

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """Forget a pass that broke off where no hook could tell."""
        self._pass.clear()

    def end_forward(self) -> None:
        """The pass is whole: it is kept."""
        self._calls.update(self._pass)
        self._pass.clear()

    def abort_forward(self) -> None:
        """Forget a pass that broke off."""
        self._pass.clear()

    def request(self, call: AttentionCall) -> Request | None:
        """Nothing but to see the call, whose edits are done."""
        return Request(output=False)

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Keep the call."""
        at = call.module, call.layer, call.mask.query_offset
        if at in self._pass:
            raise HeadscopeError(
                f"layer {call.layer} of {call.module} attends more than once in a forward pass, as towers do that go "
                "through images or windows: keep another tower with tower=..."
            )
        if at in self._calls:
            raise HeadscopeError(
                f"layer {call.layer} of {call.module} attends at position {at[2]} once more: keep one prompt, with "
                "what continues its cache, in a block"
            )
        self._pass[at] = _moved(call, self.device)

    @property
    def calls(self) -> tuple[AttentionCall, ...]:
        """What was kept, in the order of layers and passes; a call's values are not its own."""
        return tuple(self._calls[at] for at in sorted(self._calls))

    def like(self, call: AttentionCall) -> AttentionCall:
        """What was kept of the same layer and positions, on the device of ``call``.

        Raises:
            HeadscopeError: nothing was, or of other examples, queries, keys, or other padding.
        """
        found = self._calls.get((call.module, call.layer, call.mask.query_offset))
        where = f"layer {call.layer} of {call.module} at position {call.mask.query_offset}"
        if found is None:
            raise HeadscopeError(f"nothing was kept of {where}; keep and trace the same layers and passes")
        sizes = [(*x.query.shape[:3], x.key.shape[2]) for x in (found, call)]
        if sizes[0] != sizes[1] or not _same_padding(found, call):
            raise HeadscopeError(
                f"{where} attends with (example, head, query, key) of {sizes[1]}, but {sizes[0]} were kept, or with "
                "other padding; give both runs texts of the same number of tokens, padded alike"
            )
        return _moved(found, call.key.device, copy=False)


def _moved(call: AttentionCall, device: torch.device | str | None, *, copy: bool = True) -> AttentionCall:
    """``call`` with its large tensors on ``device`` (None: where they are), copied, for a cache may write into its
    keys again; keys stand for the values."""

    def there(x: Tensor) -> Tensor:
        return x.detach().to(device=device or x.device, copy=copy)

    key, bias = there(call.key), call.position_bias
    bias = None if bias is None else there(bias)
    return call.with_(query=there(call.query), key=key, value=key, position_bias=bias)


def _same_padding(one: AttentionCall, other: AttentionCall) -> bool:
    return _equal(one.mask.start, other.mask.start) and _equal(one.mask.end, other.mask.end)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.cpu(), b.cpu())


@contextmanager
def keep_attention(
    model: ModelLike,
    *,
    layers: Sequence[int] | None = None,
    tower: str | None = None,
    device: torch.device | str | None = None,
) -> Iterator[ReferenceRun]:
    """Keep the queries and keys of the run inside the block, for ``statistics.Divergence`` of a later run from it.

    A pass takes (head + kv_head) x d_head numbers a token and layer, and the position bias where there is one (T5);
    keys that it reads from a cache are kept again, so a text is best kept in one pass.

    Args:
        model: load_model's result or a Hugging Face model.
        layers: keep only these (all by default).
        tower: which tower, as in ``trace``.
        device: where to keep them, such as ``"cpu"``; by default where they are.

    Raises:
        HeadscopeError: an architecture that cannot be traced exactly, a layer that does not attend, two prompts in one
            block, or a tower that attends more than once in a pass.
    """
    kept = ReferenceRun(device)
    with attached(model, kept, tower=tower, layers=layers):
        yield kept
