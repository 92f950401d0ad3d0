"""One head on one prompt, however long: its pattern, or beyond 256 tokens the map of its blocks."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from headscope.interp.models import load_model
from headscope.interp.plots.blocks import block_map
from headscope.interp.plots.pattern import CELLS, pattern
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics import BlockMap
from headscope.interp.tracing.maps import head_pattern, tokens_of
from headscope.interp.tracing.recording import trace

SIDE = math.isqrt(CELLS)  # cells a side of what can still be read


def head_on_prompt(lm: Loadable, prompt: str, layer: int, head: int, *, title: str = "", log: bool = True) -> go.Figure:
    """What head (``layer``, ``head``) attends to on ``prompt``: every token's weights up to 256 tokens, beyond that
    the mean weights of square blocks, as few as 256 a side hold, without the whole pattern in memory.

    ``lm``: load_model's result, or what load_model takes; ``log``: see ``pattern``.

    Raises:
        HeadscopeError: a head that does not exist, or a model that cannot be traced.
    """
    lm = load_model(lm)
    HeadSet(((layer, head),)).check(lm.info.layers, lm.info.heads)
    title, count = title or f"Pattern of head L{layer}H{head}", len(tokens_of(lm, prompt))
    if count <= SIDE:
        weights, tokens = head_pattern(lm, prompt, layer, head)
        return pattern(weights, tokens, tokens, title=title, log=log)
    with trace(lm, [BlockMap(math.ceil(count / SIDE))], layers=[layer]) as tracer:
        lm([prompt])
    return block_map(tracer.record, layer, head, title=title, log=log)
