"""Which query rows of a call an edit acts on: by phase, and by position.

A row belongs to the prompt or to a generated token by the prompt's boundary (``headscope.interp.prompts.boundary``),
whatever the passes: cached or not, chunked, padded to the left. The phases:

- ``"always"``: every row.
- ``"prefill"``: the prompt's rows.
- ``"decode"``: rows of generated tokens. The first generated token is chosen by the prompt's last row, so untouched.
- ``"answer"``: the prompt's last row too: every row that chooses a token. This is the protocol of Wu et al. 2024 (arXiv
  2404.15574), whose code reads the prompt without its last token unmasked and decodes from that token masked.

Where nobody says where the prompt ends (a forward pass outside ``generate``, ``prompt_boundary`` and the tasks), a pass
of one row that continues a cache is a generated token's, and any other reads the prompt, as in the tracer; ``"answer"``
is then refused for passes of the prompt, whose last row nobody can tell.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import members

During = Literal["always", "prefill", "decode", "answer"]
PHASES: tuple[str, ...] = get_args(During)
Rows = slice | Tensor  # a range of rows, or bool (batch or 1, query)


def chosen_rows(call: AttentionCall, during: str, positions: Any = None) -> Rows:
    """The rows of ``call`` in a phase and, with ``positions`` (a span, or the name of a published one), at these.

    Raises:
        HeadscopeError: cross-attention, whose calls do not say where decoding stands, a boundary that is not known, or
            rows whose positions cannot be told.
    """
    if call.cross and (during != "always" or positions is not None):
        raise HeadscopeError(
            "cross-attention does not say where decoding stands; edit it with during='always' and no positions"
        )
    rows = _phase(call, during)
    if positions is None or is_none(rows):
        return rows
    require_told(call, "positions")
    held = members(positions, Plan(call).query_positions, call.query.shape[0])
    return held & as_mask(rows, call)


def _phase(call: AttentionCall, during: str) -> Rows:
    count, offset = call.query.shape[2], call.mask.query_offset
    if during == "always":
        return slice(0, count)
    known = known_boundary()
    if known is None:
        generated = offset > 0 and count == 1
        if during == "answer" and not generated:
            raise HeadscopeError(
                "during='answer' has to know where the prompt ends: call generate, or enter "
                "headscope.interp.prompts.prompt_boundary(tokens of the prompt)"
            )
        return slice(0, count if generated == (during != "prefill") else 0)
    lengths = [length - (during == "answer") for length in known.lengths]
    counted = call.mask.start is None and call.mask.segments is None and not call.gaps
    if len(lengths) == 1 and (known.padded or counted):
        cut = min(max(lengths[0] - offset, 0), count)
        return slice(0, cut) if during == "prefill" else slice(cut, count)
    if len(lengths) not in (1, call.query.shape[0]):
        raise HeadscopeError(
            f"the boundaries of {len(lengths)} prompts are given, but the batch has {call.query.shape[0]} examples"
        )
    if not known.padded:
        require_told(call, f"during={during!r}")
        if call.mask.segments is not None:
            raise HeadscopeError(
                f"during={during!r} has one boundary an example, but this one holds several sequences (packed): give "
                "each sequence an example of its own, or use during='always' with positions"
            )
    device = call.query.device
    at = torch.arange(count, device=device)[None] + offset if known.padded else Plan(call).query_positions
    before = at < torch.tensor(lengths, device=device)[:, None]
    return before if during == "prefill" else ~before


def token_positions(call: AttentionCall, what: str) -> Tensor:
    """Each query row's position from its example's first token, (batch or 1, query), for ``what`` goes by them.

    Raises:
        HeadscopeError: cross-attention, or rows whose positions cannot be told.
    """
    if call.cross:
        raise HeadscopeError(f"{what} goes by positions, which the calls of cross-attention do not tell")
    require_told(call, what)
    return Plan(call).query_positions


def require_told(call: AttentionCall, what: str) -> None:
    """Positions count from an example's first token, which a mask with padding between tokens does not show.

    Raises:
        HeadscopeError: such a mask; a ready-made one that hides earlier keys from a pass that continues a cache is one.
    """
    if call.gaps:
        raise HeadscopeError(
            f"{what} count from an example's first token, but this mask hides keys between tokens, or earlier ones "
            "from a pass that continues a cache: give a mask (batch, length) of ones and zeros, or put the padding at "
            "the ends"
        )


def prompt_stop(call: AttentionCall, what: str) -> Tensor:
    """Where the first generated token stands, counted as the mask counts (padding too): (batch or 1,).

    Raises:
        HeadscopeError: nobody said where the prompt ends, or rows whose positions cannot be told.
    """
    known, start = known_boundary(), call.mask.start
    if known is None:
        raise HeadscopeError(
            f"{what} has to know where the prompt ends: call generate, or enter "
            "headscope.interp.prompts.prompt_boundary(tokens of the prompt)"
        )
    require_told(call, what)
    lengths = torch.tensor(known.lengths, device=call.query.device)
    return lengths if known.padded or start is None else lengths + start


def prompt_keys(call: AttentionCall, what: str) -> Tensor:
    """Which keys are of the prompt, not generated: bool (batch or 1, key).

    Raises:
        HeadscopeError: nobody said where the prompt ends and the pass continues a cache, or positions cannot be told.
    """
    at = torch.arange(call.key.shape[2], device=call.key.device)[None] + call.mask.key_offset
    if known_boundary() is None and call.mask.query_offset == 0:
        return torch.ones_like(at, dtype=torch.bool)  # all of it is the prompt
    return at < prompt_stop(call, what)[:, None]


def last_row(call: AttentionCall, rows: Rows) -> Rows:
    """Those of ``rows`` that are the prompt's last row, which chooses the first token of the answer.

    Raises:
        HeadscopeError: cross-attention, or a boundary that is not known.
    """
    answer, decode = chosen_rows(call, "answer"), chosen_rows(call, "decode")
    if isinstance(answer, slice) and isinstance(decode, slice) and is_every(rows, call):
        return slice(answer.start, answer.stop if is_none(decode) else decode.start)
    return as_mask(answer, call) & ~as_mask(decode, call) & as_mask(rows, call)


def is_none(rows: Rows) -> bool:
    """Whether a range holds no row (a tensor of rows is not looked into: that would wait for a GPU)."""
    return isinstance(rows, slice) and rows.start >= rows.stop


def is_every(rows: Rows, call: AttentionCall) -> bool:
    """Whether a range holds every row of the call."""
    return isinstance(rows, slice) and rows.start == 0 and rows.stop >= call.query.shape[2]


def as_mask(rows: Rows, call: AttentionCall) -> Tensor:
    """The rows as bool (batch or 1, query)."""
    if isinstance(rows, Tensor):
        return rows
    mask = torch.zeros(1, call.query.shape[2], dtype=torch.bool, device=call.query.device)
    mask[:, rows] = True
    return mask
