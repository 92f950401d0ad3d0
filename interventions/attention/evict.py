"""Eviction: a model that sees only the keys that a policy keeps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import KeyPolicy, Policy, RowPolicy, by_head
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import make
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.rotary import Layer, Rotation, rotations
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.attention.found import context_rows
from headscope.interventions.attention.score_edit import ScoresEdit
from headscope.interventions.phases import require_told, token_positions

FARTHEST = 2**31 - 1  # tokens


@dataclass(frozen=True, eq=False)
class EvictKeys(FindingEdit, ScoresEdit):
    """Rows after the prompt see only the keys that ``policy`` keeps of it at ``budget``, and all later keys.

    Keys are chosen layer by layer when the prompt was read, by the attention of the model as it is edited until there
    (an evicting layer's rows of the prompt are whole, as kvpress leaves them), and stay chosen. Nothing is taken out of
    a cache: scores of evicted keys become -inf, which gives what a cache without them would give, and saves no memory.
    What was read is the prompt without its last token, whose row chooses the first token of the answer and may be
    edited (``during="answer"``), so that a prompt read at once and one whose last token comes by itself are the same.
    ``read`` says it instead: the first so many tokens, wherever the prompt ends, as for prose that is scored at once.

    ``streaming_llm`` goes by positions alone and acts on every row that is meant. Policies that need what is yet to
    come (``oracle``), a pass of their own (``dapq``) or all of a row's scores (``top_k``) are measured, not run.

    Args:
        policy: one of ``headscope.interp.cache.POLICIES``.
        budget: how many keys of the prompt are kept, or the share of them.
        options: the policy's settings, ``{"window": 32}``.
        read: tokens after which keys are evicted; None: when the prompt was read.
        strength: 1 takes the keys away, s < 1 leaves 1 - s of their weight before renormalisation.
    """

    _: KW_ONLY
    policy: str = "snapkv"
    budget: int | float = 256
    options: Mapping[str, Any] | None = None
    read: int | None = None

    source: ClassVar[str] = "as the policy's; eviction at the prompt's end after NVIDIA/kvpress @ 8bb29b9c"
    unit: ClassVar[str] = "share of an evicted key's weight removed"
    nothing: ClassVar[str] = "no row came after what was read, or its budget holds all of it"
    refused: ClassVar[dict[str, str]] = {
        "chunked prefill": "keys are chosen over the whole prompt",
        "cross-attention": "no prompt ends there",
        "packed sequences": "keys are kept of one sequence an example",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read is not None and (isinstance(self.read, bool) or not isinstance(self.read, int) or self.read < 1):
            raise HeadscopeError(f"EvictKeys: read must be a whole number of tokens from 1 on, not {self.read!r}")
        if not isinstance(self.options, Mapping | None):
            raise HeadscopeError(f"EvictKeys: options are settings by name, {{'window': 32}}, not {self.options!r:.60}")
        made: Policy = make(POLICIES[self.policy], self.policy, self.options or {})
        if "edits" in made.refused:
            raise HeadscopeError(f"EvictKeys cannot run {self.policy}: {made.refused['edits']}; choose another policy")
        budget = Budget.of(self.budget)
        if isinstance(made, RowPolicy) and budget.keys is None:
            raise HeadscopeError(f"EvictKeys: {self.policy} takes a number of keys, not a share: budget=256")
        if budget.keys is not None:  # of any prompt that is longer
            kept = torch.tensor([budget.keys])
            if why := made.idle(kept + 1, kept):
                warnings.warn(f"EvictKeys: {self.policy} at a budget of {budget}: {why}", stacklevel=3)
        for name, value in (("_made", made), ("_kept", budget), ("_rotations", {})):
            object.__setattr__(self, name, value)

    @property
    def phased(self) -> bool:
        """It has to know where the prompt ends, unless ``read`` says it."""
        return super().phased or self.read is None

    def in_force(self, model: ModelLike, tower: str | None) -> EvictKeys:
        """A copy with a memory of its own, that knows how layers turn queries where the policy needs it."""
        copy = super().in_force(model, tower)
        assert isinstance(copy, EvictKeys)
        if "rotation" in copy._policy.needs and not copy.neutral:
            object.__setattr__(copy, "_rotations", rotations(model, tower, copy.holds))
        return copy

    @property
    def _policy(self) -> Policy:
        made: Policy = vars(self)["_made"]
        return made

    @property
    def _budget(self) -> Budget:
        kept: Budget = vars(self)["_kept"]
        return kept

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Choose keys where a prompt is read, whichever rows are edited; then evict."""
        if self.concerns(call.module, call.layer) and isinstance(self._policy, KeyPolicy):
            self._choose(call, self._policy)
        return super().edit(call)

    def _choose(self, call: AttentionCall, policy: KeyPolicy) -> None:
        """Hold the evicted keys of a call that begins new examples: (batch, kv_head or head or 1, key)."""
        held, rows = self.found.follow(call), ~self._after(call)
        if held is not None:
            if bool(rows.any()):
                raise HeadscopeError("EvictKeys chooses keys over the whole prompt: read it in one pass, not in pieces")
            self.found.keep(call, held)
            return
        at = torch.arange(rows.shape[1], device=rows.device)
        stop = torch.where(rows, at + 1, 0).amax(1).expand(call.query.shape[0])
        if call.mask.end is not None:
            stop = torch.minimum(stop, call.mask.end)
        turned: Mapping[Layer, Rotation] = vars(self)["_rotations"]
        reading = Reading(call, stop, rotation=turned.get((call.module, call.layer)))
        if bool((reading.count < 1).any()):
            self.found.keep(call, torch.zeros_like(reading.keys)[:, None])
            return
        kept = policy.sets(reading, [self._budget])[0]
        self.found.keep(call, by_head(reading, reading.keys[:, None] & ~kept))

    def _after(self, call: AttentionCall) -> Tensor:
        """The rows that come after what was read: bool (batch or 1, query)."""
        if call.cross:
            raise HeadscopeError("EvictKeys edits self-attention; cross-attention has no prompt that ends")
        if self.read is not None:
            return token_positions(call, "the tokens that are read") >= self.read
        return ~context_rows(call, "context")

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Scores of evicted keys."""
        bias = -math.inf if self.strength == 1 else math.log1p(-self.strength)
        if isinstance(self._policy, RowPolicy):
            return self._by_position(call, mine, self._policy, bias)
        mine = mine & self._after(call)[:, None]
        evicted = self.found.recall(call).expand(-1, call.query.shape[1], -1)
        self.note(mine.any(-1, keepdim=True) & evicted)
        if bool(mine.all()) and call.score_edit is None:
            return call.with_key_bias(call.either(evicted, bias, 0.0))
        return self.add(call, mine, keys=call.either(evicted, bias, 0.0))

    def _by_position(self, call: AttentionCall, mine: Tensor, policy: RowPolicy, bias: float) -> AttentionCall:
        """Scores of keys that a row does not see by its position and theirs."""
        require_told(call, "positions of keys")
        start = torch.zeros(1, dtype=torch.long, device=mine.device) if call.mask.start is None else call.mask.start
        kept = torch.tensor(self._budget.keys, device=mine.device)
        if self.read is not None:
            mine = mine & self._after(call)[:, None]
        last = call.mask.query_offset + call.query.shape[2] - start
        self.note(mine.any() & (last > kept))
        if (ends := policy.ends(int(kept))) is not None:
            at = torch.arange(call.key.shape[2], device=mine.device) + call.mask.key_offset - start[:, None]
            later = call.either(at >= ends[0], bias, 0.0)
            return self.add(call, mine, keys=later[:, None], within=(ends[1], FARTHEST))

        def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = start[b if start.shape[0] > 1 else 0]
            return torch.where(policy.shows(q - own, k - own, kept), s, s + bias)

        return self.only(call, mine, changed)
