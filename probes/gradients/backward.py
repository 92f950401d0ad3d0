"""One forward and one backward pass of a prompt: what every attention layer computed with, and dL/dz of its heads.

That is all that A * dL/dA needs: dL/dA_ij = dL/dz_i . v_j (``headscope.kernels.saliency``). The gradient of a layer is
the total one, through all later layers. No map is held; where attention has a softcap or sink logits (Gemma 2, gpt-oss)
the backward pass computes a few rows of it at a time again (``headscope.kernels.streaming.backward``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites import attached
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import members
from headscope.kernels.saliency import Saliency, saliency
from headscope.probes.lenses.targets import Token, token_ids

Inputs = str | Mapping[str, Any]  # one text, or a model's inputs of one example (``VisionPrompt.inputs``)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's call, and dL/dz (1, head, query, d_value) of its heads."""

    call: AttentionCall
    gradient: Tensor

    def saliency(self, spans: Sequence[Any] = (), rows: Any = None, last: int | None = None) -> Saliency:
        """The sums of ``kernels.saliency.Saliency`` over named spans of keys, and over the queries of the span ``rows``
        (None: all; ``last``: of that row of the padded text alone)."""
        call, gradient, plan = self.call, self.gradient, Plan(self.call)
        held = [members(span, plan.key_positions, 1) for span in spans]
        chosen = None if rows is None else members(rows, plan.query_positions, 1)
        scores = call.inputs()
        if last is not None:
            scores, gradient = scores.rows(slice(last, last + 1)), gradient[:, :, last : last + 1]
        inside = torch.stack(held, -1) if held else None
        return saliency(scores, call.value, gradient, spans=inside, rows=chosen)


@dataclass(frozen=True, eq=False)
class Backward:
    """A prompt's ``loss`` (cross-entropy of ``target`` after it, in nats), its ``layers``, which places of the padded
    text are ``real`` tokens, and the place of the row that predicts the target, ``last``."""

    loss: float
    target: int
    layers: dict[int, Layer]
    real: Tensor
    last: int


def backward(
    lm: LanguageModel, inputs: Inputs, target: Token | None = None, layers: Sequence[int] | None = None
) -> Backward:
    """Explain the token ``target`` after a prompt (None: the one that the model would take).

    Raises:
        HeadscopeError: several examples, a target that is several tokens, logits that are not numbers, or an edit that
            moves mass between keys after softmax (the weights are then not those that z is the sum over).
    """
    given = dict(lm.encode(inputs)) if isinstance(inputs, str) else dict(inputs)
    ids = given["input_ids"]
    if ids.shape[0] != 1:
        raise HeadscopeError(f"explain one example at a time, not {ids.shape[0]}: call it once an example")
    mask = given.get("attention_mask")
    real = torch.ones(ids.shape[1], dtype=torch.bool) if mask is None else mask[0].bool().cpu()
    last = int(real.nonzero()[-1])
    options: dict[str, Any] = {"use_cache": False} if takes(lm.inner, "use_cache") else {}
    if takes(lm.inner, "logits_to_keep"):
        options["logits_to_keep"] = len(real) - last
    moved = {name: x.to(lm.device) if isinstance(x, Tensor) else x for name, x in given.items()}
    kept = Outputs(tower_size(lm).heads if layers is None else layers)
    with ExitStack() as stack:
        stack.enter_context(frozen(lm))
        named = None if layers is None else {layer: f"layer {layer}" for layer in layers}
        stack.enter_context(attached(lm, kept, layers=named, grad=True))
        logits = lm.model(**moved, **options).logits[0, -(len(real) - last)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lm.check_finite(logits.detach())
        wanted = int(logits.argmax()) if target is None else token_ids(lm, [target])[0]
        loss = -logits.log_softmax(-1)[wanted]
        found = kept.gradients(lambda z: torch.autograd.grad(loss, z, allow_unused=True))
    return Backward(float(loss.detach()), wanted, found, real, last)


class Outputs(Handler):
    """Keeps every call, and z as what a gradient can be asked for; ``factor`` multiplies z of one layer."""

    def __init__(self, layers: Any, factor: tuple[int, float] | None = None) -> None:
        self.layers, self.factor = frozenset(layers), factor
        self.held: dict[int, tuple[AttentionCall, Tensor]] = {}

    def concerns(self, module: str, layer: int) -> bool:
        """The layers that are read (all where the model's code does not show which attend)."""
        return not self.layers or layer in self.layers

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z itself, in a graph that leads to it."""
        if not torch.is_grad_enabled():
            return z
        if call.redistribution is not None:
            raise HeadscopeError(
                f"an edit moves mass between the keys of layer {call.layer} after softmax: A * dL/dA is not computed "
                "under it; leave that edit out"
            )
        if self.factor is not None and self.factor[0] == call.layer:
            z = z * self.factor[1]
        z = z if z.requires_grad else z.detach().requires_grad_()
        self.held[call.layer] = call, z
        return z

    def gradients(self, ask: Callable[[list[Tensor]], Sequence[Tensor | None]]) -> dict[int, Layer]:
        """Every layer with what ``ask`` gives of the layers' z; 0 where a loss does not depend on one."""
        found = ask([z for _, z in self.held.values()])
        return {
            layer: Layer(_detached(call), torch.zeros_like(z) if slope is None else slope)
            for (layer, (call, z)), slope in zip(self.held.items(), found, strict=True)
        }


def _detached(call: AttentionCall) -> AttentionCall:
    """The call without its graph, which would hold every layer's activations."""
    q, k, v = (x.detach() for x in (call.query, call.key, call.value))
    sinks = None if call.sinks is None else call.sinks.detach()
    return call.with_(query=q, key=k, value=v, sinks=sinks)
