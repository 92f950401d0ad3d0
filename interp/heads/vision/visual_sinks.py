"""Visual attention sinks: image tokens that mark themselves as sinks, and the heads that look past them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, per_model
from headscope.interp.heads.sinking.dimensions import sink_dimensions
from headscope.interp.heads.vision.chats import ChatMethod
from headscope.interp.heads.vision.sinks import Score, read_sinks
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial

FIRST = 2  # the authors' code looks for sinks from the third layer on


@dataclass(frozen=True, kw_only=True)
class VisualSinks(ChatMethod):
    """Score heads by the mass that text puts on visual sink tokens, or by how they look past those.

    Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321;
    src/logic/logic.py): an image token is a sink of layer l where phi = max over the sink dimensions of |x_d| / rms(x),
    of the stream x that enters l, exceeds tau; the code looks from the third layer on, and so do we. Of every text row
    after the picture, S is the mass on the picture and r the share of S that is on no sink (0 where S is). Scores are
    means over those rows: "sink_mass", of the mass on sinks, S (1 - r); "image_mass", of S; "ratio", of r, over the
    rows with S >= ``least`` (0 without any); "centric", of whether the head is image-centric there: the layer has a
    visual sink, S >= ``least`` and r >= ``rho``.

    Dimensions and tau are found for the model (``sink_dimensions`` [OURS]) in layers where they part sinks from other
    tokens; with ``dimensions`` and ``tau`` given, in all layers from the third on. ``provenance["visual_sinks"]`` has
    of every layer tau, the sinks a chat, the largest phi of other image tokens and the smallest of sinks (what tau
    parts), and ``times``: the attention that image sinks receive from later text over that of other image tokens. Each
    trial's details have its sinks by layer. Where no image token is a sink, ``provenance["note"]`` says why.

    What it does not show: that sinks hold nothing, or that an image-centric head is needed (``RedistributeSinks``
    changes them). Where ``times`` is near 1 the tokens that pass tau are no sinks of attention, whatever phi says.

    Args:
        score_by: which of the four.
        rho: the least share of S on no sink, of an image-centric head (the paper's; its code bounds 1 - r).
        least: the least mass on the picture.
        dimensions: the sink dimensions by number, with ``tau``; None: those of the model.
        tau: the threshold of phi (the paper's is 20, for models of 4,096 dimensions and more).
        texts: where dimensions are looked for (by default passages of the bundled prose).
    """

    name: ClassVar[str] = "visual_sinks"
    unit: ClassVar[str] = "share"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2503.03321"
    tests: ClassVar[str] = "heads/vision/test_methods.py"
    reproduced: ClassVar[str] = (
        "phi, masses, ratios and choices against hidden states and eager weights of tiny models of nine families"
    )
    not_reproduced: ClassVar[str] = "the share of sinks on background, and benchmarks of 7B models"

    score_by: Score = "sink_mass"
    rho: float = 0.5
    least: float = 0.2
    dimensions: Sequence[int] | None = None
    tau: float | None = None
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_by not in ("sink_mass", "image_mass", "ratio", "centric"):
            raise HeadscopeError(f"score_by={self.score_by!r}: choose sink_mass, image_mass, ratio or centric")
        if (self.dimensions is None) != (self.tau is None):
            raise HeadscopeError("give dimensions and tau together, or neither")
        if not (0 <= self.rho <= 1 and 0 <= self.least <= 1):
            raise HeadscopeError(f"rho={self.rho} and least={self.least} are shares: choose 0 to 1")

    def thresholds(self, lm: LanguageModel) -> tuple[tuple[int, ...], dict[int, float]]:
        """The sink dimensions, and tau of every layer in which it parts sinks from other tokens."""
        return per_model(self, lm, lambda: self._thresholds(lm), "thresholds")

    def _thresholds(self, lm: LanguageModel) -> tuple[tuple[int, ...], dict[int, float]]:
        if self.dimensions is not None and self.tau is not None:
            return tuple(self.dimensions), dict.fromkeys(range(FIRST, lm.info.layers), float(self.tau))
        found = sink_dimensions(lm, None if self.texts is None else list(self.texts))
        tau = dict(zip(found.layers, found.tau, strict=True))
        usable = {layer: tau[layer] for layer in found.usable if layer >= FIRST}
        return found.dimensions, usable

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        return {**held, "dimensions": None if self.dimensions is None else list(self.dimensions)}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        one = self.looks(lm)[trial["sample"]]
        seen = read_sinks(lm, one, *self.thresholds(lm))
        scores = np.full((lm.info.layers, lm.info.heads), np.nan)
        for layer, of in seen.items():
            scores[layer, : len(of.mass)] = of.score(self.score_by, self.rho, self.least)
        told = {"dimensions": list(self.thresholds(lm)[0]), "layers": [of.told() for of in seen.values()]}
        return scores, told

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        layers = [[one["layers"][i] for one in details] for i in range(len(details[0]["layers"]))]
        found = [_over_pictures(rows) for rows in layers]
        told: dict[str, Any] = {"dimensions": details[0]["dimensions"], "visual_sinks": found}
        return told if any(row["sinks"] for row in found) else {**told, "note": _nothing(found)}


def _over_pictures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One layer's facts over all chats: sinks a chat, the extremes of phi, the median of ``times``."""
    each = {key: [row[key] for row in rows if key in row] for key in ("phi_below", "phi_above", "times")}
    reduced: dict[str, Callable[[Any], Any]] = {"phi_below": max, "phi_above": min, "times": np.median}
    found = {key: float(reduced[key](each[key])) for key in each if each[key]}
    count = float(np.mean([len(row["sinks"]) for row in rows]))
    return {"layer": rows[0]["layer"], "tau": rows[0]["tau"], "sinks": count} | found


def _nothing(layers: Sequence[dict[str, Any]]) -> str:
    """Why no image token is a sink."""
    seen = [row for row in layers if row["tau"] is not None and "phi_below" in row]
    if not seen:
        return "no dimension of the stream parts sink tokens from others here; give dimensions and tau if you know them"
    best = max(seen, key=lambda row: float(row["phi_below"] / row["tau"]))
    return (
        f"no image token is a sink: the nearest has phi {best['phi_below']:.3g} in layer {best['layer']}, where tau is "
        f"{best['tau']:.3g}"
    )
