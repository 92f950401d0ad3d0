"""Head discovery: one published method a file, ``heads.NAME(lm, ...) -> HeadScores``.

``METHODS`` has them by name: to add one, a file in its family's folder and a line here. ``METHODS["induction"]`` is the
declaration, a frozen dataclass whose fields are the settings; ``heads.induction(lm, length=20)`` makes and runs it, and
``heads.discover([METHODS["induction"](length=20), ...], lm)`` runs several in the fewest forward passes.

    lookup/    one key a query: previous token, earlier occurrence, what followed it
    sinking/   where attention rests
    spread/    over how much it spreads
    anchors/   what the tokens of a response look back to and come back to
    position/  where it goes by position alone, over distance, depth and models
    recall/    what is brought back from the context
    causal/    what the model loses without them
    divergence/  what a part of the prompt changes
    vision/    what is seen of a picture

Importing this package is cheap: a method's file, and torch with it, is imported when the method is first used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.interp.registry import Registry, make, page

if TYPE_CHECKING:
    from headscope.interp.heads.base import HeadMethod
    from headscope.interp.heads.discovery import discover as discover
    from headscope.interp.results.scores import HeadScores
    from headscope.interp.sites.given import Loadable

METHODS: Registry[HeadMethod] = Registry(
    "head method",
    "methods",
    "headscope.interp.heads",
    {
        "induction": "lookup.induction:Induction",
        "previous_token": "lookup.previous_token:PreviousToken",
        "duplicate_token": "lookup.duplicate_token:DuplicateToken",
        "copying": "lookup.copying:Copying",
        "sinks": "sinking.alpha:Sinks",
        "hidden_sinks": "sinking.hidden_sinks:HiddenSinks",
        "sink_key_norm": "sinking.key_norm:SinkKeyNorm",
        "sink_value_norm": "sinking.value_norm:SinkValueNorm",
        "sink_hidden_norm": "sinking.hidden_norm:SinkHiddenNorm",
        "sink_angle": "sinking.angle:SinkAngle",
        "massive_activations": "sinking.massive:MassiveActivations",
        "sink_dimension": "sinking.dimension:SinkDimension",
        "attention_entropy": "spread.entropy:AttentionEntropy",
        "effective_context": "spread.effective_context:EffectiveContext",
        "head_sparsity": "spread.head_sparsity:HeadSparsity",
        "head_span": "anchors.head_span:HeadSpan",
        "waad": "anchors.waad:WindowedSpan",
        "fai": "anchors.fai:FutureAttention",
        "position_bias": "position.bias:PositionBias",
        "retrieval": "recall.retrieval:Retrieval",
        "retrieval_paraphrased": "recall.retrieval_paraphrased:RetrievalParaphrased",
        "context_activation": "recall.context_activation:ContextActivation",
        "locos": "recall.locos:Locos",
        "locos_attention": "recall.locos_attention:LocosAttention",
        "locos_dla": "recall.locos_dla:LocosDLA",
        "locos_contrastive": "recall.locos_contrastive:LocosContrastive",
        "qrhead": "recall.qrhead:QRHead",
        "receiver": "recall.receiver:Receiver",
        "head_gating": "causal.head_gating:HeadGating",
        "contrastive_gating": "causal.contrastive_gating:ContrastiveGating",
        "ablation_importance": "causal.ablation_importance:AblationImportance",
        "gradient_importance": "causal.gradient_importance:GradientImportance",
        "context_divergence": "divergence.context_divergence:ContextDivergence",
        "pattern_divergence": "divergence.pattern_divergence:PatternDivergence",
        "vhd": "divergence.vhd:VisionHeadDivergence",
        "visual_sinks": "vision.visual_sinks:VisualSinks",
        "object_region": "vision.object_region:ObjectRegion",
    },
)

_RUN = {
    "lm": "load_model's result, or what load_model takes.",
    "out": "folder for ``NAME.json``, ``NAME.parquet`` and the journal that makes a killed run resume.",
    "progress": "show a bar on a terminal.",
}
_RAISES = """

Returns:
    HeadScores, one trial (layer, head) each; NaN in layers without softmax attention.

Raises:
    HeadscopeError: a setting out of range, nothing to score, a model that cannot be traced exactly or gives NaN.
"""
__all__ = ["METHODS", "discover", "method", *METHODS]


def method(name: str) -> Callable[..., HeadScores]:
    """A method as a function of a model: ``method("induction")(lm, length=20, out="runs/heads")``.

    Raises:
        HeadscopeError: there is no method of that name; or, from the function, a setting that it does not have.
    """
    return _function(name.replace("-", "_"))


@cache
def _function(name: str) -> Callable[..., HeadScores]:
    cls = METHODS[name]

    def function(
        lm: Loadable, /, *, out: str | Path | None = None, progress: bool = True, **settings: Any
    ) -> HeadScores:
        from headscope.interp.heads.discovery import discover

        return discover([make(cls, name, settings)], lm, out=out, progress=progress)[0]

    function.__name__ = function.__qualname__ = name
    function.__doc__ = page(cls, **_RUN) + _RAISES
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [one.replace(kind=keyword) for one in inspect.signature(cls).parameters.values()]
    run = inspect.signature(function).parameters
    function.__signature__ = inspect.Signature([run["lm"], *own, run["out"], run["progress"]])  # type: ignore[attr-defined]
    return function


def __getattr__(name: str) -> Any:
    if name == "discover":
        return import_module("headscope.interp.heads.discovery").discover
    if name in METHODS:
        return method(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS})
