"""What is measured of a model on conversations: answers that are right, and where the answers' rows look."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.interp.laboratory.decoder import Decoder
from headscope.interp.laboratory.focusft.conversations import END
from headscope.interp.statistics import SpanMass
from headscope.interp.statistics.spans import intervals
from headscope.interp.tracing.recording import trace


def recall(model: Decoder, ids: Tensor, answered: Tensor) -> float:
    """Share of the values' words that are the model's first choice, read causally, each after the right ones before
    it. Half of that is had by copying what follows any of a key's two places."""
    asked = (answered & (ids != END))[:, 1:]
    said = model(ids)[:, :-1].argmax(-1)
    return float((said == ids[:, 1:])[asked].double().mean())


def attention_shares(model: Decoder, ids: Tensor, answered: Tensor, sinks: int = 1) -> dict[str, float]:
    """Attention sink mass and context engagement, under whatever mask and weights the model runs with.

    The paper names both without a formula that could be read, and its code has neither. [OURS], means over layers,
    heads and the rows of answers' tokens: ``sink``, the mass on the first ``sinks`` tokens; ``context``, the mass on
    all other tokens that are no answer's. What is left is on answers. Context counts every token alike, the asked pair
    and noise.
    """
    context = (~answered).tolist()
    spans = [intervals([at for at, held in enumerate(row) if held and at >= sinks]) for row in context]
    with trace(model, SpanMass({"sink": (0, sinks), "context": spans})) as tracer:
        model(ids)
    mass = tracer.record["span_mass"].transpose("example", "query", "layer", "head", "span").to_numpy()
    rows = torch.from_numpy(mass).double()[answered.cpu()].mean((0, 1, 2))
    return {"sink": float(rows[0]), "context": float(rows[1])}
