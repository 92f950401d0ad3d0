"""What is kept of an attention layer after its forward pass, and the weights that are computed from it again."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.parts import cut, one_head
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import log_tile


class Capture(Handler):
    """Keeps each layer's queries and keys, after every edit that was entered before it.

    ``bytes`` kept are ``batch * (heads + kv_heads) * tokens * d_head`` of the model's precision a layer.

    Args:
        device: where they are kept; None: where the layer computes, as are layers whose mask or edit is a function.
    """

    only_reads = True

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self.calls: dict[int, AttentionCall] = {}

    def edit(self, call: AttentionCall) -> AttentionCall:
        here = call.query.device
        held = (call.score_edit, call.redistribution, call.mask.rule)  # functions that may hold tensors of this device
        device = here if self.device is None or any(x is not None for x in held) else self.device
        query, key = (x.detach().to(device).contiguous() for x in (call.query, call.key))
        # values play no part in a pattern; keys stand in for them, so that nothing more is held
        self.calls[call.layer] = moved(call.with_(query=query, key=key, value=key), device)
        return call


def moved(call: AttentionCall, device: torch.device | str) -> AttentionCall:
    """``call`` with its small tensors (mask, sinks, biases) on ``device``."""

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(device)

    mask = call.mask
    names = ("start", "end", "origin", "segments")
    held = {name: to(getattr(mask, name)) for name in names}
    mask = type(mask)(**{**vars(mask), **held})
    biases = {name: to(getattr(call, name)) for name in ("sinks", "position_bias", "key_bias")}
    return call.with_(mask=mask, **biases)


def example_of(call: AttentionCall, example: int) -> AttentionCall:
    """One example of a batch, its padding cut away.

    Raises:
        HeadscopeError: mass was moved between keys of a batch (``attention.parts.cut``).
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    first, stop = 0, keys
    if call.mask.start is not None:
        first = int(call.mask.start[min(example, call.mask.start.numel() - 1)])
    if call.mask.end is not None:
        stop = int(call.mask.end[min(example, call.mask.end.numel() - 1)])
    if call.query.shape[0] == 1 and (first, stop) == (0, keys):
        return call
    return cut(call, slice(example, example + 1), slice(first, min(stop, queries)), slice(first, stop))


class KeptLayer:
    """One layer of one example. Weights are exact: softmax over all the keys that a row sees.

    Args:
        call: a batch of one.
        lse: (head, query) where the pass gave it; rows that are NaN are computed when they are needed.
    """

    def __init__(self, call: AttentionCall, lse: Tensor | None = None) -> None:
        self.call = call
        _, self.heads, self.queries, _ = call.query.shape
        self.keys = call.key.shape[2]
        self.scores = call.inputs()
        unknown = torch.full((self.heads, self.queries), torch.nan, dtype=self.scores.dtype, device=call.query.device)
        self.lse = unknown if lse is None else lse.to(unknown)
        self._head = lru_cache(maxsize=4)(self._one_head)

    @property
    def nbytes(self) -> int:
        """Bytes of the queries, keys and lse that are held."""
        return sum(x.numel() * x.element_size() for x in (self.call.query, self.call.key, self.lse))

    def _one_head(self, head: int) -> tuple[AttentionCall, Scores]:
        call = one_head(self.call, head)
        return call, call.inputs()

    def head(self, head: int) -> Scores:
        """The scores of one query head."""
        return self._head(head)[1]

    def lse_of(self, rows: Tensor, head: int | None = None) -> Tensor:
        """The lse of rows (n,) ascending, of one head or all: (head, n)."""
        which = slice(None) if head is None else slice(head, head + 1)
        known = self.lse[which][:, rows]
        if bool(known.isnan().any()):
            missing = rows[known.isnan().any(0)]
            call = self.call if head is None else self._head(head)[0]
            found = call.attend(Request(output=False, lse=True, query_rows=missing)).lse
            assert found is not None
            self.lse[which, missing] = found[0].to(self.lse)
            known = self.lse[which][:, rows]
        return known

    def weights(self, rows: Tensor, keys: slice, head: int | None = None) -> Tensor:
        """The pattern of rows (n,) ascending and ``keys`` (with both ends), of one head or all: (head, n, m)."""
        call, scores = (self.call, self.scores) if head is None else self._head(head)
        if call.redistribution is not None:  # of whole rows: those that follow each other together
            cuts = (rows.diff() != 1).nonzero()[:, 0] + 1
            runs = torch.tensor_split(rows, cuts.cpu())
            made = [call.pattern(slice(int(run[0]), int(run[-1]) + 1), keys) for run in runs if run.numel()]
            return torch.cat(made, 2)[0]
        return log_tile(scores, self.lse_of(rows, head)[None], rows, keys).exp_()[0]

    def hidden(self, rows: Tensor, keys: slice, head: int) -> Tensor | None:
        """Which keys are hidden from which rows: bool (n, m), or None where none is."""
        scores = self.head(head)
        columns = torch.arange(keys.start, keys.stop, device=rows.device)
        seen = scores.mask.tile(rows, columns, torch.zeros(1, dtype=torch.long, device=rows.device))
        hidden = None if seen is None else ~seen[0, 0]
        if scores.bias is not None:
            away = (scores.bias[0, 0, keys] == -torch.inf)[None]
            hidden = away.expand(rows.numel(), -1) if hidden is None else hidden | away
        return hidden

    def bounds(self, first: int, stop: int) -> tuple[int, int]:
        """Keys outside which no row of ``first:stop`` sees any."""
        return self.call.mask.key_bounds(first, stop, self.keys)


__all__ = ["Capture", "KeptLayer", "example_of"]
