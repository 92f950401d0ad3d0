"""Redistribution onto an image: heads that look at it take from sink tokens what its other tokens get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.sinking.dimension import EPSILON
from headscope.interp.heads.sinking.dimensions import sink_dimensions
from headscope.interp.models import load_model
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import by_example, members
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.phases import as_mask, chosen_rows
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Request

Meaning = Literal["paper", "code"]
# the authors' lists (src/logic/constants.py) and the depth of the model: LLaVA-1.5 and LLaVA-1.6 with Vicuna
PRESETS: dict[str, tuple[tuple[int, ...], int]] = {
    "llava-1.5-7b": ((1415, 2533), 32),
    "llava-1.5-13b": ((2100, 4743), 40),
}


@dataclass(frozen=True, eq=False)
class RedistributeSinks(FindingEdit):
    """Heads that look at ``span`` move a share of what sink tokens get onto the span's other tokens.

    VAR, Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321;
    src/logic/logic.py; the formulas agree with its classes to 6e-17). Token t is a sink of layer l where phi = max over
    ``dimensions`` of |x_d| / rms(x), of the stream x that enters l (edited layers below included), is above ``tau``.
    A row and head with S = the mass on the span are chosen where S >= ``least`` and the share of S that is not on sinks
    is at least ``rho``. There every sink (in the span or not) loses the share ``share`` of its weight, and the span's
    other tokens get it in proportion to theirs. Rows up to the span's end are left alone, as is every head of a layer
    that has no sink in the span. Sinks are those of the prompt: generated tokens are none.

    The code means the opposite by both numbers, ``meaning="code"``: there ``rho`` bounds the share *on* sinks from
    above, (its divisor S + 1e-6 a token), and ``share`` is what sinks *keep*. The paper leaves the last layer out, the
    code edits it by mistake: ``layers`` says. The code also looks for sinks in the first prompt of a process alone, and
    uses the 7B model's dimensions for the 13B one; here neither. A row without mass on the span's other tokens (NaN in
    the code) stays as it is.

    Dimensions and tau are those of LLaVA-1.5-7B unless given; ``found_in(lm)`` finds them for any model. phi cannot
    exceed sqrt(d_model), so a tau above it is refused, and a block in which nothing qualifies says what was missing.

    What it does not show: that sinks hold no information; that the moved mass helps (the paper: heads without
    selection collapse).

    Args:
        span: the image, or any span: positions, or a published name.
        dimensions: the sink dimensions, or the name of the authors' list: ``"llava-1.5-7b"``, ``"llava-1.5-13b"``.
        tau: the threshold of phi, one number or one of each layer in ``layers``.
        rho, share, least: which heads and how much, see above. ``strength`` s moves s times the share.
        meaning: ``"paper"`` or ``"code"``, what ``rho`` and ``share`` mean.
        layers: as of every edit of patterns; by default, for the authors' models, from the third to the last but one.
    """

    _: KW_ONLY
    span: Any = "image"
    dimensions: Any = "llava-1.5-7b"
    tau: float | tuple[float, ...] = 20.0
    rho: float = 0.5
    share: float = 0.6
    least: float = 0.2
    meaning: Meaning = "paper"

    source: ClassVar[str] = "arXiv 2503.03321"
    unit: ClassVar[str] = "share of sinks' mass moved"
    refused: ClassVar[dict[str, str]] = {
        "TransformerLens": "sinks are read off the residual stream, which a bridge has hook points of its own for",
        "cross-attention": "keys and stream are of different sequences",
        "packed sequences": "sinks are of one sequence",
    }

    def __post_init__(self) -> None:
        if isinstance(self.dimensions, str):
            if self.dimensions not in PRESETS:
                raise HeadscopeError(
                    f"RedistributeSinks: no list of dimensions is called {self.dimensions!r}: name one of "
                    f"({', '.join(PRESETS)}), give dimensions, or use RedistributeSinks.found_in(lm)"
                )
            chosen, depth = PRESETS[self.dimensions]
            object.__setattr__(self, "dimensions", chosen)
            if self.layers is None:
                object.__setattr__(self, "layers", tuple(range(2, depth - 1)))
        elif self.layers is None:
            raise HeadscopeError("RedistributeSinks: name the layers that dimensions were found in, layers=(...)")
        super().__post_init__()
        object.__setattr__(self, "dimensions", tuple(int(d) for d in self.dimensions))
        object.__setattr__(self, "_phi", {})
        object.__setattr__(self, "_seen", {"phi": 0.0, "sinks": 0, "rows": 0})
        self._check_numbers()

    def _check_numbers(self) -> None:
        layers, taus = self.layers or (), self.tau if isinstance(self.tau, Sequence) else (self.tau,)
        if not self.dimensions or min(self.dimensions) < 0:
            raise HeadscopeError("RedistributeSinks: give at least one sink dimension, by number")
        if isinstance(self.tau, Sequence):
            object.__setattr__(self, "tau", tuple(float(x) for x in self.tau))
            if len(taus) != len(layers):
                raise HeadscopeError(f"RedistributeSinks: tau has {len(taus)} numbers for {len(layers)} layers")
        for name, low in (("rho", self.rho), ("share", self.share), ("least", self.least)):
            if not 0.0 <= low <= 1.0:
                raise HeadscopeError(f"RedistributeSinks: {name} must be between 0 and 1, not {low!r}")
        if self.meaning not in ("paper", "code"):
            raise HeadscopeError(f"RedistributeSinks: meaning must be 'paper' or 'code', not {self.meaning!r}")

    @classmethod
    def found_in(cls, model: ModelLike, texts: Sequence[str] | None = None, **settings: Any) -> RedistributeSinks:
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
        found = cls.found_in(model, texts)
        held = {"dimensions": found.dimensions, "layers": found.layers, "tau": found.tau}
        return held if not {"layers", "tau"} & set(given) else {"dimensions": found.dimensions}

    @property
    def moved(self) -> float:
        """The share of a sink's weight that is moved."""
        return self.strength * (self.share if self.meaning == "paper" else 1.0 - self.share)

    @property
    def neutral(self) -> bool:
        """A share of nothing, too, changes nothing."""
        return self.moved == 0

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
                f"{self.tau}); find tau and dimensions with RedistributeSinks.found_in"
            )
        return f"no head puts {self.least:g} of a row on the span, with its sinks' share as rho={self.rho:g} asks"

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
                    f"where |x_d| / rms is at most {math.sqrt(width):.3g}: use RedistributeSinks.found_in(lm)"
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

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Mass moved in the rows and heads that look at the span."""
        seen = vars(self)["_seen"]
        sinks, span = self.found.recall(call)[:, 0], self.keys(call, self.span, "the span")
        ends = [max((stop for _, stop in row), default=0) for row in by_example(self.span)]
        behind = Plan(call).query_positions >= torch.tensor(ends, device=sinks.device)[:, None]
        mine = mine & behind[:, None]
        inside = sinks & span
        of_prompt = self._in_span(call)
        seen["rows"] += int(mine.any())
        seen["sinks"] += int(of_prompt.sum())
        mine = mine & of_prompt.any(-1)[:, None, None]
        if not bool(mine.any()):
            return call
        columns = torch.stack([span.expand_as(inside), inside], -1)
        mass = call.attend(Request(output=False, linear=columns)).linear
        assert mass is not None
        mine = mine & self._looks(mass[..., 0], mass[..., 1], span.sum(-1)[:, None, None])
        self.note(mine)
        if not bool(mine.any()):
            return call
        keep = call.either(mine, 1.0 - self.moved, 1.0)
        return call.with_redistribution(Redistribution(sinks[:, None], keep, onto=span[:, None]))

    def _in_span(self, call: AttentionCall) -> Tensor:
        """The prompt's sinks in the span, (batch, position), those too that a cache with a window holds no more."""
        sinks = self.found.whole(call)[:, 0]
        at = torch.arange(sinks.shape[1], device=sinks.device)[None]
        at = at if call.mask.start is None else at - call.mask.start[:, None]
        return sinks & members(self.span, at, call.query.shape[0])

    def _looks(self, mass: Tensor, on_sinks: Tensor, count: Tensor) -> Tensor:
        """Which rows and heads look at the span."""
        if self.meaning == "code":
            right = on_sinks / (mass + 1e-6 * count) <= self.rho
        else:
            right = mass - on_sinks >= self.rho * mass
        return right & (mass >= self.least) & (mass > 0)

    def _tau(self, layer: int) -> float:
        if isinstance(self.tau, tuple):
            return self.tau[(self.layers or ()).index(layer)]
        return float(self.tau)

    def _look(self, call: AttentionCall) -> None:
        if call.cross or call.mask.segments is not None:
            raise HeadscopeError(
                "RedistributeSinks reads self-attention of one sequence an example, not cross-attention or packed "
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
