"""Base of the edits of positions: queries and keys are turned to other places, and rows may see other keys.

RoPE is undone and done again where the layer attends, so that keys in a cache, which the model turned when it read
them, are right at every later call. Positions are those of the mask: a row's column, which is its position but for a
number that an example's tokens share and that scores do not show. Passes whose ``position_ids`` say otherwise are
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.rotary import Layer, Rotation, rotations
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.interventions.phases import is_every
from headscope.interventions.positions.rescored import Rescored, mixed
from headscope.kernels.masks import IndexRule, Mask
from headscope.kernels.score_edits import ScoreEdit

UNSEEN = -(2**40)  # of an example of which no token was read yet

# what edits that say anew which tokens see which refuse beside what every edit of positions does, and why
BEHIND_WINDOWS = {"layers with a window": "a row would see keys that the layer hides from it"}
IN_PIECES = {"chunked prefill": "a token of the pass before cannot see one of the next"}


@dataclass(frozen=True, eq=False)
class PositionEdit(PatternEdit):
    """Base of the edits of positions. A subclass writes ``change`` with ``rotation``, and ``placed`` or ``rescored``.

    Strength s between 0 and 1 moves scores by s from the model's to the edit's; a pair that only the edit shows has s
    of its weight, one that it hides 1 - s of it [OURS].
    """

    refused: ClassVar[dict[str, str]] = {
        "models without rotary position embedding": "positions are edited by turning queries and keys",
        "M-RoPE, and frequencies that change with the length of the text": "keys in a cache were turned by others",
        "two edits of positions in one layer": "the second would not know what the first did",
        "position_ids that do not count an example's tokens": "positions are read from the mask",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("_rotations", {}), ("_given", None), ("_ahead", {})):
            object.__setattr__(self, name, value)

    def in_force(self, model: ModelLike, tower: str | None) -> PositionEdit:
        """A copy that knows how each layer of the model turns its queries and keys."""
        copy = replace(self)
        if not self.neutral:
            object.__setattr__(copy, "_rotations", rotations(model, tower, self.holds))
        return copy

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """A pass begins, perhaps with positions of its own."""
        object.__setattr__(self, "_given", inputs.get("position_ids"))

    def rotation(self, call: AttentionCall) -> Rotation:
        """How this call's queries and keys were turned, by their columns.

        Raises:
            HeadscopeError: that cannot be told, or another edit changed it.
        """
        if call.cross or call.position_bias is not None:
            raise HeadscopeError(f"{type(self).__name__} edits self-attention whose positions are rotary, not this")
        if call.moved:
            raise HeadscopeError(
                f"two edits of positions meet in layer {call.layer} of {call.module}: give each its own layers"
            )
        self._check_positions(call)
        held: dict[Layer, Rotation] = vars(self)["_rotations"]
        found = held.get((call.module, call.layer))
        if found is None:
            raise HeadscopeError(
                f"layer {call.layer} of {call.module} attended in no pass over text alone, so nobody saw how it turns "
                "its queries: name layers of the tower that reads text"
            )
        return found

    def _check_positions(self, call: AttentionCall) -> None:
        """Refuse ``position_ids`` that are not the columns but for one number an example, the same in every pass."""
        if call.mask.segments is not None:
            return  # positions begin anew in every sequence, and rows see their own alone
        given: Tensor | None = vars(self)["_given"]
        batch, _, count, _ = call.query.shape
        at = torch.arange(count, device=call.query.device)
        real = call.mask.query_is_real(at)
        real = (at >= 0 if real is None else real).expand(batch, -1)
        ahead = torch.zeros_like(real, dtype=torch.long)
        if given is not None and given.dim() == 2 and given.shape[1] == count:
            ahead = ahead + at + call.mask.query_offset - given.to(at.device)
        held: dict[str, Tensor] = vars(self)["_ahead"]
        here, known = torch.where(real, ahead, UNSEEN).amax(1, keepdim=True), held.get("by")
        if call.mask.query_offset == 0 or known is None or known.shape != here.shape:
            known = here
        held["by"] = known = torch.where(known == UNSEEN, here, known)
        if bool((real & (ahead != known)).any()):
            raise HeadscopeError(
                f"{type(self).__name__} reads positions from the mask, and this pass was given position_ids that count "
                "otherwise: leave them out, or count each example's tokens from its first (as generate does)"
            )

    def placed(
        self,
        call: AttentionCall,
        mine: Tensor,
        query: Tensor,
        key: Tensor,
        shows: IndexRule | None = None,
        ahead: int = 0,
    ) -> AttentionCall:
        """``call`` with the rows ``mine`` as if their queries and all keys were these; ``shows`` as in ``rescored``."""
        if self.strength == 1 and self.heads is None and is_every(self.rows(call), call):
            mask = call.mask if shows is None else _with_rule(call, shows, ahead)
            return call.with_(query=query.to(call.query.dtype), key=key.to(call.key.dtype), mask=mask, moved=True)

        def queries(_: int, examples: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
            return query[examples][:, heads][:, :, rows]

        return self.rescored(call, mine, Rescored(call, queries, key), shows, ahead)

    def rescored(
        self, call: AttentionCall, mine: Tensor, new: Rescored, shows: IndexRule | None = None, ahead: int = 0
    ) -> AttentionCall:
        """``call`` with the scores of rows ``mine`` (batch or 1, head, query) as ``new`` has them.

        ``shows`` (example, head, query, key positions) -> bool says which keys these rows then see, up to ``ahead``
        tokens later than themselves; None: those before them.
        """
        first, share = call.mask.query_offset, self.strength

        def meant(b: Tensor, h: Tensor, q: Tensor) -> Tensor:
            return mine[b if mine.shape[0] > 1 else 0, h, q - first]

        def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            scores = new(s, b, h, q, k)
            if share < 1:
                after = k <= q if shows is None else shows(b, h, q, k)
                scores = mixed(s, scores, k <= q, after, share)
            return torch.where(meant(b, h, q), scores, s)

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert shows is not None
            seen = shows(b, h, q, k) if share == 1 else shows(b, h, q, k) | (k <= q)
            return torch.where(meant(b, h, q), seen, k <= q)

        edit = ScoreEdit(changed, pointwise=False)
        later = call.score_edit  # of scores, whatever they are made of
        mask = call.mask if shows is None else _with_rule(call, rule, ahead)
        return call.with_(score_edit=edit if later is None else edit.then(later), mask=mask, moved=True)


def _with_rule(call: AttentionCall, rule: IndexRule, ahead: int) -> Mask:
    return replace(call.mask, right=ahead, left=None, rule=rule, examples=call.query.shape[0])


def require_causal(call: AttentionCall, what: str) -> None:
    """Refuse a call whose rows see something else than all keys before them but padding, where ``what`` says it anew.

    Raises:
        HeadscopeError: a window that is shorter than the text, packed sequences, a ready-made mask.
    """
    mask, keys = call.mask, call.key.shape[2]
    last = call.query.shape[2] == 1 and mask.right is None and mask.query_offset - mask.key_offset == keys - 1
    window = mask.left is not None and mask.left < mask.query_offset + call.query.shape[2] - 1 - mask.key_offset
    other = mask.chunk is not None or mask.segments is not None or mask.rule is not None
    if (mask.right != 0 and not last) or window or other or mask.key_offset:
        raise HeadscopeError(
            f"{what} says which tokens see which, and layer {call.layer} of {call.module} sees less than all before "
            "them (a window, packed sequences or a mask of its own): name layers that attend causally"
        )
