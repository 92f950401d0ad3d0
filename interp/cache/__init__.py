"""What a cache that evicts keys, or a sparse mask, would lose: policies, and their exact loss at a budget.

A **policy** says which keys are kept at a **budget** (so many keys, or a share of them). ``keys/``: one score a key,
made when the prompt was read, decides once what stays in the cache. ``rows/``: a rule decides for every query. To add
one: a file, and a line in ``POLICIES``.

``lose`` (``survey``) runs prompts and measures per layer and head what each policy loses; nothing of the model changes.
``headscope.interventions`` has the edit, ``EvictKeys``, that runs a model under a policy. ``long_context_scores``
(``texts``) asks the same of texts: which of them have parts that look far back.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headscope.interp.registry import Registry

if TYPE_CHECKING:
    from headscope.interp.cache.policy import Policy
    from headscope.interp.cache.survey import lose as lose
    from headscope.interp.cache.texts import LADM as LADM
    from headscope.interp.cache.texts import long_context_scores as long_context_scores
    from headscope.interp.cache.texts import long_context_spans as long_context_spans

POLICIES: Registry[Policy] = Registry(
    "policy",
    "policies",
    "headscope.interp.cache",
    {
        "oracle": "keys.oracle:Oracle",
        "snapkv": "keys.snapkv:SnapKV",
        "h2o": "keys.h2o:H2O",
        "observed_attention": "keys.observed_attention:ObservedAttention",
        "tova": "keys.tova:TOVA",
        "knorm": "keys.knorm:Knorm",
        "keydiff": "keys.keydiff:KeyDiff",
        "expected_attention": "keys.expected_attention:ExpectedAttention",
        "ems": "keys.ems:EMS",
        "dapq": "keys.dapq:DapQ",
        "s3": "keys.s3:S3",
        "streaming_llm": "rows.streaming_llm:StreamingLLM",
        "top_k": "rows.top_k:TopK",
        "vertical_slash": "rows.vertical_slash:VerticalSlash",
        "block_sparse": "rows.block_sparse:BlockSparse",
        "flexprefill": "rows.flexprefill:FlexPrefill",
        "moba": "rows.moba:MoBA",
        "critiprefill": "rows.critiprefill:CritiPrefill",
        "rectified_spaattn": "rows.rectified:Rectified",
        "longheads": "rows.longheads:LongHeads",
        "neighbourhood": "rows.neighbourhood:Neighbourhood",
        "routed": "rows.routed:Routed",
    },
)

_HOME = {"lose": "survey", "LADM": "texts", "long_context_scores": "texts", "long_context_spans": "texts"}

__all__ = ["POLICIES", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)  # which needs torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
