"""PAINT as an edit: the image tokens that its vision tower picks out are raised, for every prompt anew."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import tower_size
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.attention.raise_span import selected
from headscope.interventions.attention.score_edit import SpanEdit, number
from headscope.interventions.phases import During, require_told
from headscope.kernels.request import Columns, Request


@dataclass(frozen=True, eq=False)
class Paint(FindingEdit, SpanEdit):
    """Raise the scores of an image's local tokens by ``alpha`` and of its summary tokens by ``beta``: PAINT.

    Arif et al. 2025 (arXiv 2501.12206; hasanar1f/llava-hallunication-fix @ c5ee7da): Z' = Z + amount |Z| before
    softmax, in the last row of every pass (``during="answer"``), all heads. Which tokens: ``paint_tokens``, by the
    attention that the class token of the model's own vision tower pays in its first layer and its last but one (of a
    tower without one: that each token receives [OURS]), seen while the tower reads the pictures inside the block.
    ``RaiseSpanLogits`` is the same edit of tokens that are named, ``Guidance`` their guidance by a stream without the
    image, which their code also runs; with it, the authors' loop leaves the first pass unedited by mistake.

    The paper's best values; the code's arguments have beta 0.3, its script alpha 0.9 (above which text degenerates). It
    edits layers 2 to 31 of 32, here the same share of the depth [OURS].

    ``tokens="random"`` is the control: as many local and as many summary tokens at random places of each picture, the
    same places in every prompt of as many tokens [OURS].

    What it does not show: that these tokens hold objects.

    Args:
        span: the image's tokens, one for each patch of the tower, all pictures of an example in their order.
        alpha: of local tokens.
        beta: of summary tokens.
        local: share of a picture's tokens that are local ones.
        tokens: those that the "tower" picks out, or "random" ones.
        seed: of random tokens.
        strength: the factor on both amounts.
    """

    _: KW_ONLY
    span: Any = "image"
    alpha: float = 0.7
    beta: float = 0.4
    local: float = 0.25
    tokens: Literal["tower", "random"] = "tower"
    seed: int = 0
    during: During = "answer"

    source: ClassVar[str] = "Arif et al. 2025, arXiv 2501.12206; hasanar1f/llava-hallunication-fix @ c5ee7da"
    unit: ClassVar[str] = "share of a score's size"
    refused: ClassVar[dict[str, str]] = {
        "TransformerLens": "a bridge shows no vision tower",
        "resampled images": "features that are not one a patch say nothing of a patch",
        "packed images": "towers that read all pictures as one sequence (Qwen's) have no picture an example",
    }
    follows: ClassVar[tuple[str, ...]] = ("vision",)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            number("Paint", name, getattr(self, name))
        if not 0 <= self.local <= 1:
            raise HeadscopeError(f"Paint: local is a share in [0, 1], not {self.local!r}")
        if self.tokens not in ("tower", "random"):
            raise HeadscopeError(f"Paint: tokens is 'tower' or 'random', not {self.tokens!r}")
        object.__setattr__(self, "_seen", {})

    @property
    def neutral(self) -> bool:
        """Both amounts are 0."""
        return super().neutral or self.alpha == self.beta == 0

    @property
    def chooses(self) -> bool:
        """Which tokens, for each picture."""
        return self.tokens != "random"

    def with_random_choice(self, seed: int) -> Paint:
        """As many tokens at random places of each picture."""
        return replace(self, tokens="random", seed=seed)

    def in_force(self, model: ModelLike, tower: str | None) -> Paint:
        """A copy that knows its layers, and those of the vision tower.

        Raises:
            HeadscopeError: a model without a vision tower, or with one layer in it.
        """
        depth, seen = tower_size(model, tower).depth, tower_size(model, "vision").depth
        if seen < 2:
            raise HeadscopeError("Paint reads the vision tower's first layer and its last but one, and this has one")
        made = replace(self, layers=tuple(range(depth * 2 // 32, depth)) if self.layers is None else self.layers)
        object.__setattr__(made, "_read", (0, seen - 2))
        return made

    def follow(self, call: AttentionCall) -> None:
        """What each token of a picture gets in a layer of the vision tower: from the class token, and on average.

        Raises:
            HeadscopeError: pictures that are packed into one sequence.
        """
        if self.neutral or call.layer not in vars(self)["_read"]:
            return
        if call.mask.segments is not None:
            raise HeadscopeError("Paint: this tower reads its pictures as one packed sequence, so none has a row here")
        column = call.attend(Request(output=False, columns=(Columns(sum=True),))).columns[0].sum
        assert column is not None
        mean = column.double().sum(1) / call.query.shape[2]
        vars(self)["_seen"][call.layer] = call.pattern(rows=slice(0, 1))[:, :, 0].double().sum(1), mean

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Find the tokens where a prompt begins, then raise them."""
        if self.concerns(call.module, call.layer):
            before = self.found.follow(call)
            self.found.keep(call, self._tokens(call) if before is None else before)
        return super().edit(call)

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Their amounts times their scores' size, added."""
        top, bottom = self.found.recall(call).unbind(1)
        self.note(self.meets(call, mine, top | bottom))
        amount = self.strength * (call.either(top, self.alpha, 0.0) + call.either(bottom, self.beta, 0.0))
        return self.add(call, mine, "size", keys=amount[:, None])

    def _tokens(self, call: AttentionCall) -> Tensor:
        """The top and bottom tokens of a call that begins a prompt: bool (batch, 2, position).

        Raises:
            HeadscopeError: pictures that were not seen, or whose tokens are not one a patch.
        """
        require_told(call, "the image's tokens")
        batch, count = call.query.shape[0], call.key.shape[2]
        span = self.keys(call, self.span, "the image's tokens").expand(batch, count)
        found = torch.zeros(2, batch, count, dtype=torch.bool, device=span.device)
        places = span.nonzero()
        if len(places):
            held = [vars(self)["_seen"].get(layer) for layer in vars(self)["_read"]]
            if None in held:
                raise HeadscopeError("Paint: the pictures of this prompt were not seen; read them inside the block")
            pictures, patches = held[0][0].shape
            each, rest = divmod(len(places), pictures)
            if rest or patches - each not in (0, 1):
                raise HeadscopeError(
                    f"Paint: {len(places)} image tokens are not one for each of the {patches} patches (or all but a "
                    f"class token) of the {pictures} pictures that the vision tower read"
                )
            for i in range(pictures):
                first, late = (one[0][i, 1:] if patches > each else one[1][i] for one in held)
                at = places[i * each : (i + 1) * each]
                if self.tokens == "random":
                    at = at[torch.from_numpy(np.random.default_rng([self.seed, each]).permutation(each)).to(at.device)]
                for row, tokens in zip(found, selected(first, late, self.local), strict=True):
                    mine = at[sorted(tokens)]
                    row[mine[:, 0], mine[:, 1]] = True
        return torch.nn.functional.pad(found.transpose(0, 1), (call.mask.key_offset, 0))
