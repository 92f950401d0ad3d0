"""Token pruning at a layer: from there on only the image tokens that were looked at most stay visible."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.vision.attention import padding_mask
from headscope.interp.prompts.boundary import known_boundary
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import by_example, members
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.attention.score_edit import SpanEdit
from headscope.interventions.phases import as_mask, chosen_rows, prompt_stop, require_told

By = Literal["attention", "debiased", "random"]


@dataclass(frozen=True, eq=False)
class PruneTokens(FindingEdit, SpanEdit):
    """From ``layer`` on, hide all but ``keep`` of a span's tokens, those that the prompt's last row looks at most.

    FastV (Chen et al. 2024, arXiv 2403.06764), as the code that Zhao et al. patch has it: s_i = the attention of the
    prompt's last row on token i in layer ``layer`` - 1, mean over all heads; the ``keep`` tokens of the largest s stay.
    What is hidden in the prompt stays hidden from generated tokens. ``by="debiased"`` is Zhao et al. 2025 (arXiv
    2508.17807; intcomp/attention-bias @ e75ebe7, FastV.patch), in their order: s of tokens that are mostly padding is
    set to 0; ``keep`` is lowered to the number of the others; s_i is multiplied by exp(-sigma i / (n - 1)), i the
    token's place among the span's n, which takes the recency trend away; the largest are kept. Several images of an
    example are one sequence of tokens [OURS]. Of equal tokens the first stays.

    Hidden tokens are masked, not taken out: every row that is left is exactly what it is without these tokens at their
    old positions, but no time is saved, and their own rows are still computed (and traced).

    What it does not show: that a hidden token held nothing; what later layers need of it may have been copied before
    ``layer``. ``by="random"`` is the control: as many random places, the same in every prompt of so many tokens.

    Args:
        span: the tokens to choose among: an image, or any span, by positions or as a published name.
        layer: the first layer in which the others are hidden; 2 in FastV.
        keep: how many stay; below 1: their share, rounded down.
        by: what tokens are ranked by.
        sigma: of "debiased": the slope of the recency trend, as ``recency_trend`` fits it to the mean s over a set of
            images of one size; 0: only padding counts.
        padding: of "debiased": the tokens that are mostly padding, a span (``padded_patches`` says which); None: none.
        seed: of "random".
        strength: 1 hides, s < 1 leaves 1 - s of a token's weight before renormalisation.
        layers: those of the layers from ``layer`` on in which tokens are hidden; None: all.
    """

    _: KW_ONLY
    span: Any = "image"
    layer: int = 2
    keep: float = 0.5
    by: By = "attention"
    sigma: float = 0.0
    padding: Any = None
    seed: int = 0

    source: ClassVar[str] = "arXiv 2403.06764, 2508.17807; intcomp/attention-bias @ e75ebe7"
    unit: ClassVar[str] = "share of a token's weight removed"
    refused: ClassVar[dict[str, str]] = {
        "chunked prefill": "tokens are ranked in the prompt's last row, and hidden from all of the prompt",
        "cross-attention": "the span is of the keys' sequence, the ranking row of the queries'",
    }
    nothing: ClassVar[str] = "no token was hidden: the span holds no more than stay"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1 or self.keep <= 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise HeadscopeError(
                f"PruneTokens: layer is at least 1 and keep a number of tokens or a share, not layer={self.layer!r} "
                f"and keep={self.keep!r}"
            )
        if self.by not in ("attention", "debiased", "random"):
            raise HeadscopeError(f"PruneTokens: by is 'attention', 'debiased' or 'random', not {self.by!r}")
        if self.by == "attention" and (self.sigma or self.padding is not None):
            raise HeadscopeError("PruneTokens: sigma and padding are of by='debiased'; give that, or leave them out")
        if self.padding is not None and not isinstance(self.padding, str):
            by_example(self.padding)

    @property
    def bounded(self) -> bool:
        """The prompt's last row has to be found."""
        return True

    @property
    def chooses(self) -> bool:
        """Which tokens, for each prompt."""
        return self.by != "random"

    def with_random_choice(self, seed: int) -> PruneTokens:
        """As many random tokens."""
        return self.for_its_model(replace(self, by="random", seed=seed))

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where the model has no such layer, or a head is not there."""
        super().check(layers, heads)
        if self.layer >= layers:
            raise HeadscopeError(f"PruneTokens: layer {self.layer} does not exist: the last one is {layers - 1}")

    def holds(self, layer: int) -> bool:
        """Whether tokens are hidden in this layer."""
        return layer >= self.layer and super().holds(layer)

    def concerns(self, module: str, layer: int) -> bool:
        """These layers, and the one where tokens are ranked."""
        return not self.neutral and (layer == self.layer - 1 or self.holds(layer))

    def named_layers(self) -> dict[int, str] | None:
        """The layers that it needs to attend."""
        named = super().named_layers()
        return None if named is None else {**named, self.layer - 1: f"layer {self.layer - 1}"}

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Rank the tokens in one layer; hide some in later ones."""
        if not self.neutral and call.layer == self.layer - 1:
            self._rank(call)
        return super().edit(call) if self.holds(call.layer) else call

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The tokens that do not stay, hidden from the rows that are meant."""
        hidden = self.found.recall(call.with_(layer=self.layer - 1))[:, 0]
        self.note(self.meets(call, mine, hidden))
        bias = -math.inf if self.strength == 1 else math.log1p(-self.strength)
        return self.add_to_keys(call, mine, call.either(hidden, bias, 0.0))

    def _rank(self, call: AttentionCall) -> None:
        """Hold which tokens of the prompt are hidden, bool (batch, 1, position).

        Raises:
            HeadscopeError: cross-attention, packed sequences, or a prompt in several passes.
        """
        if call.cross or call.mask.segments is not None:
            raise HeadscopeError("PruneTokens ranks tokens of one sequence an example, in self-attention")
        before = self.found.follow(call)
        if before is not None:
            if bool(as_mask(chosen_rows(call, "prefill"), call).any()):
                raise _in_pieces()
            return self.found.keep(call, before)
        require_told(call, "the prompt's last row")
        batch, count = call.query.shape[0], call.key.shape[2]
        last = _last_rows(call).expand(batch)
        if int(last.max()) >= call.query.shape[2]:
            raise _in_pieces()
        span = self.keys(call, self.span, "the span's tokens").expand(batch, count)
        at = Plan(call).key_positions
        padding = None if self.padding is None else members(self.padding, at, batch).expand(batch, count)
        scores = torch.zeros(batch, count, dtype=torch.float64, device=span.device)
        for row in sorted(set(last.tolist())) if self.by != "random" else ():
            mean = call.pattern(rows=slice(row, row + 1))[:, :, 0].double().mean(1)
            scores = torch.where((last == row)[:, None], mean, scores)
        hidden = torch.zeros_like(span)
        for b in range(batch):
            tokens = span[b].nonzero()[:, 0]
            real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else ~padding[b, tokens]
            hidden[b, tokens] = ~self._stays(scores[b, tokens], real)
        self.found.keep(call, torch.nn.functional.pad(hidden[:, None], (call.mask.key_offset, 0)))

    def _stays(self, scores: Tensor, real: Tensor) -> Tensor:
        """Which of a span's tokens (token,) of these scores stay."""
        count = len(scores)
        most = int(self.keep) if self.keep >= 1 else int(self.keep * count)
        if self.by == "random":
            drawn = np.random.default_rng([self.seed, count]).permutation(count)
            return torch.from_numpy(drawn).to(scores.device) < most
        if self.by == "debiased":
            most = min(most, int(real.sum()))
            place = torch.arange(count, device=scores.device) / max(1, count - 1)
            scores = scores * real * torch.exp(-self.sigma * place)
        stays = torch.zeros_like(real)
        stays[scores.argsort(descending=True, stable=True)[:most]] = True
        return stays


def padded_patches(width: int, height: int, grid: tuple[int, int], threshold: float = 0.5) -> list[int]:
    """The patches, in raster order, of which more than ``threshold`` is padding, where an image was padded to a square.

    ``headscope.interp.heads.vision.attention.padding_mask`` of a grid over the square, for an image that no processor
    has seen yet; the bands are not rounded to pixels [OURS].

    Args:
        width, height: of the image before padding.
        grid: rows and columns of patches.
    """
    side, (rows, columns) = max(width, height), grid
    left, top = (width - side) / 2, (height - side) / 2
    places = np.arange(rows * columns).reshape(rows, columns)
    square = ImageGrid(places, (left, top, left + side, top + side), (width, height))
    return [int(place) for place in places[~padding_mask(square, threshold)]]


def _last_rows(call: AttentionCall) -> Tensor:
    """The row of the prompt's last token, where nobody says where it ends the last one that is no padding: (batch or
    1,), beyond the call's rows where it is not among them."""
    if known_boundary() is not None:
        return prompt_stop(call, "PruneTokens") - 1
    end = call.mask.end
    return torch.tensor([call.query.shape[2]], device=call.query.device) - 1 if end is None else end - 1


def _in_pieces() -> HeadscopeError:
    return HeadscopeError(
        "PruneTokens ranks tokens in the prompt's last row and hides them from all of the prompt, and this one comes "
        "in several passes: read it in one"
    )
