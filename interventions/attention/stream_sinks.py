"""Tokens that are sinks by the residual stream: what edits of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.sinking.dimension import EPSILON
from headscope.interp.heads.sinking.dimensions import sink_dimensions
from headscope.interp.models import load_model
from headscope.interp.prompts.sequences import joined
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import by_example, members
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.phases import as_mask, chosen_rows

# the authors' lists (src/logic/constants.py) and the depth of the model: LLaVA-1.5 and LLaVA-1.6 with Vicuna
PRESETS: dict[str, tuple[tuple[int, ...], int]] = {
    "llava-1.5-7b": ((1415, 2533), 32),
    "llava-1.5-13b": ((2100, 4743), 40),
}


WINDOW = 64  # tokens of each text in which sinks are looked for


@dataclass(frozen=True, eq=False)
class StreamSinks(FindingEdit):
    """Base of the edits of sink tokens of a prompt, as Kang et al. 2025 (arXiv 2503.03321) find them.

    Token t is a sink of layer l where phi = max over ``dimensions`` of |x_d| / rms(x), of the stream x that enters l
    (edited layers below included), is above ``tau``. Sinks are those of the prompt: generated tokens are none. Rows up
    to the span's end are left alone.

    Args:
        span: the image, or any span: positions, or a published name.
        dimensions: the sink dimensions, or the name of the authors' list: ``"llava-1.5-7b"``, ``"llava-1.5-13b"``.
        tau: the threshold of phi, one number or one of each layer in ``layers``.
        layers: as of every edit of patterns; by default, for the authors' models, from the third to the last but one.
    """

    _: KW_ONLY
    span: Any = "image"
    dimensions: Any = "llava-1.5-7b"
    tau: float | tuple[float, ...] = 20.0

    refused: ClassVar[dict[str, str]] = {
        "TransformerLens": "sinks are read off the residual stream, which a bridge has hook points of its own for",
        "cross-attention": "keys and stream are of different sequences",
        "packed sequences": "sinks are of one sequence",
    }

    def __post_init__(self) -> None:
        if isinstance(self.dimensions, str):
            if self.dimensions not in PRESETS:
                raise HeadscopeError(
                    f"{type(self).__name__}: no list of dimensions is called {self.dimensions!r}: name one of "
                    f"({', '.join(PRESETS)}), give dimensions, or use {type(self).__name__}.found_in(lm)"
                )
            chosen, depth = PRESETS[self.dimensions]
            object.__setattr__(self, "dimensions", chosen)
            if self.layers is None:
                object.__setattr__(self, "layers", tuple(range(2, depth - 1)))
        elif self.layers is None:
            raise HeadscopeError(f"{type(self).__name__}: name the layers that dimensions were found in, layers=(...)")
        super().__post_init__()
        object.__setattr__(self, "dimensions", tuple(int(d) for d in self.dimensions))
        object.__setattr__(self, "_phi", {})
        object.__setattr__(self, "_seen", {"phi": 0.0, "sinks": 0, "rows": 0})
        self._check_numbers()

    def _check_numbers(self) -> None:
        layers, taus = self.layers or (), self.tau if isinstance(self.tau, Sequence) else (self.tau,)
        kind = type(self).__name__
        if not self.dimensions or min(self.dimensions) < 0:
            raise HeadscopeError(f"{kind}: give at least one sink dimension, by number")
        if isinstance(self.tau, Sequence):
            object.__setattr__(self, "tau", tuple(float(x) for x in self.tau))
            if len(taus) != len(layers):
                raise HeadscopeError(f"{kind}: tau has {len(taus)} numbers for {len(layers)} layers")

    def check(self, layers: int, heads: int) -> None:
        """Refuse layers, and so dimensions and tau, of a deeper model."""
        if (last := max(self.layers or (0,))) >= layers:
            raise HeadscopeError(
                f"{type(self).__name__}: layer {last} does not exist, the model has layers 0-{layers - 1}; dimensions "
                f"and tau are another model's: use {type(self).__name__}.found_in(lm)"
            )
        super().check(layers, heads)

    @classmethod
    def found_in(cls, model: ModelLike, texts: Sequence[str] | None = None, **settings: Any) -> Self:
        """With the dimensions, and the tau of each layer, that ``sink_dimensions`` finds in a model, in the layers from
        the third to the last but one where tokens above tau are sinks [OURS].

        Raises:
            HeadscopeError: no dimension parts sinks from other tokens there.
        """
        lm = load_model(model)
        found = sink_dimensions(lm, None if texts is None else list(texts))
        inner = [layer for layer in found.usable if 2 <= layer <= lm.info.layers - 2]
        if not found.dimensions or not inner:
            raise HeadscopeError(
                f"no dimension of {lm.name} parts sink tokens from others in a layer between its second and its last "
                f"(found: {found.dimensions or 'none'}): leave this model unedited, or give dimensions, tau and layers"
            )
        tau = dict(zip(found.layers, found.tau, strict=True))
        own = {"dimensions": found.dimensions, "layers": tuple(inner), "tau": tuple(tau[layer] for layer in inner)}
        return cls(**{**own, **settings})

    @classmethod
    def measured(cls, model: ModelLike, given: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
        """Without dimensions, those of the model."""
        if "dimensions" in given:
            return {}
        lm = load_model(model)
        found = cls.found_in(lm, list(joined(lm, texts, WINDOW)))
        held = {"dimensions": found.dimensions, "layers": found.layers, "tau": found.tau}
        return held if not {"layers", "tau"} & set(given) else {"dimensions": found.dimensions}

    @property
    def streams(self) -> tuple[str, ...]:  # type: ignore[override]
        """What enters the layers."""
        return () if self.neutral else ("resid_pre",)

    @property
    def phased(self) -> bool:
        """Sinks are the prompt's, so it has to know where that ends."""
        return True

    @property
    def nothing(self) -> str:  # type: ignore[override]
        """What was missing."""
        seen = vars(self)["_seen"]
        if not seen["rows"]:
            return f"no row stands behind the span {self.span!r}"
        if not seen["sinks"]:
            return (
                f"no token of the span passes tau (the largest phi of any token was {seen['phi']:.3g}, tau "
                f"{self.tau}); find tau and dimensions with {type(self).__name__}.found_in"
            )
        return self.untouched

    @property
    def untouched(self) -> str:
        """Why nothing was changed although the span holds sinks."""
        return "no row that was meant sees them"

    def stream(self, call: StreamCall) -> Tensor:
        """Which tokens of this pass are sinks of this layer.

        Raises:
            HeadscopeError: a dimension that the stream lacks, or a tau that phi cannot reach.
        """
        if self.concerns(call.module, call.layer):
            tau, width = self._tau(call.layer), call.x.shape[-1]
            if max(self.dimensions) >= width or tau >= math.sqrt(width):
                raise HeadscopeError(
                    f"dimensions {self.dimensions} with tau={tau:g} find no sink in a stream of {width} dimensions, "
                    f"where |x_d| / rms is at most {math.sqrt(width):.3g}: use {type(self).__name__}.found_in(lm)"
                )
            x = call.x.float()
            rms = x.square().mean(-1, keepdim=True).add(EPSILON).sqrt()
            vars(self)["_phi"][call.layer] = (x[..., list(self.dimensions)] / rms).abs().amax(-1)
        return call.x

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Note the sinks of the prompt, whichever rows are edited; then move mass from them."""
        if self.concerns(call.module, call.layer):
            self._look(call)
        return super().edit(call)

    def behind(self, call: AttentionCall, mine: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which keys are sinks, and which are the span's, bool (batch or 1, key); the rows ``mine`` that stand behind
        the span of an example that has a sink in it; and these sinks, (batch, position)."""
        seen = vars(self)["_seen"]
        sinks, span = self.found.recall(call)[:, 0], self.keys(call, self.span, "the span")
        ends = [max((stop for _, stop in row), default=0) for row in by_example(self.span)]
        behind = Plan(call).query_positions >= torch.tensor(ends, device=sinks.device)[:, None]
        mine = mine & behind[:, None]
        of_prompt = self.found.whole(call)[:, 0] & self.spanned(call)
        seen["rows"] += int(mine.any())
        seen["sinks"] += int(of_prompt.sum())
        return sinks, span, mine & of_prompt.any(-1)[:, None, None], of_prompt

    def spanned(self, call: AttentionCall) -> Tensor:
        """Which positions so far are the span's, also those that a window has dropped: (batch, position)."""
        whole = self.found.whole(call)
        at = torch.arange(whole.shape[-1], device=whole.device)[None]
        at = at if call.mask.start is None else at - call.mask.start[:, None]
        return members(self.span, at, call.query.shape[0])

    def _tau(self, layer: int) -> float:
        if isinstance(self.tau, tuple):
            return self.tau[(self.layers or ()).index(layer)]
        return float(self.tau)

    def _look(self, call: AttentionCall) -> None:
        if call.cross or call.mask.segments is not None:
            raise HeadscopeError(
                f"{type(self).__name__} reads self-attention of one sequence an example, not cross-attention or packed "
                "sequences: give each sequence an example of its own"
            )
        phi = vars(self)["_phi"].pop(call.layer, None)
        if phi is None or phi.shape != (call.query.shape[0], call.query.shape[2]):
            raise HeadscopeError(f"the stream that enters layer {call.layer} was not seen, so its sinks are not known")
        before = self.found.follow(call)
        real = call.mask.query_is_real(torch.arange(call.query.shape[2], device=phi.device))
        phi = phi if real is None else phi.masked_fill(~real, 0.0)
        vars(self)["_seen"]["phi"] = max(vars(self)["_seen"]["phi"], float(phi.max()))
        sinks = (phi > self._tau(call.layer)) & as_mask(chosen_rows(call, "prefill"), call)
        sinks = sinks[:, None].to(call.query.device)
        self.found.keep(call, sinks if before is None else torch.cat([before, sinks], -1))

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """A pass begins, perhaps on a cache."""
        vars(self)["_phi"].clear()
        super().begin_forward(inputs)
