"""AttentionCall: what one attention layer computes with. Sites produce it, statistics read it, edits change it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.compiled import plain
from headscope.interp.errors import HeadscopeError
from headscope.kernels import attention as kernels
from headscope.kernels import redistribute as redistributed
from headscope.kernels.masks import Mask
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Attended, Request
from headscope.kernels.score_edits import ScoreEdit

STOPS = ("StopAtLayerException", "EarlyStopException")  # TransformerLens' stop_at_layer, nnsight's tracer.stop()
LOWEST = -1e30  # stands for -inf where a bias says "never": finite, so that 0 times it is 0

__all__ = ["AttentionCall", "Handler", "Mask", "bare_model"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention layer at one forward pass.

    ``query`` (batch, head, query, d_head), ``key`` and ``value`` (batch, kv_head, key, ·): after position embedding and
    QK-norm, after the cache update, key/value heads not repeated. ``layer`` is the layer's index within its tower,
    ``site`` the tower's modules as a pattern such as ``"model.layers.*.self_attn"``. ``position_bias`` (batch or 1,
    head or 1, query, key) is added to the scores (T5). ``cross``: queries and keys are of different sequences, so that
    distances between them mean nothing. ``gaps``: padding stands between tokens, not only around them. ``dense``: the
    mask came as a tensor, which may hold padding without saying so.

    No model computes with the last three, which are for edits (``with_key_bias`` and so on); statistics are those of
    the edited pattern. ``key_bias`` (batch or 1, head or 1, key) is added to each key's score after softcap;
    ``score_edit`` changes the scores last; ``redistribution`` moves mass between keys after softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    layer: int
    site: str
    softcap: float | None = None
    sinks: Tensor | None = None
    position_bias: Tensor | None = None
    cross: bool = False
    gaps: bool = False
    dense: bool = False
    key_bias: Tensor | None = None
    score_edit: ScoreEdit | None = None
    redistribution: Redistribution | None = None

    def attend(self, request: Request) -> Attended:
        """Compute ``request``, sharing one pass."""
        if self.redistribution is None:
            seen = kernels.attend(**self.inputs(), request=request)
        else:
            seen = redistributed.redistribute(**self.inputs(), move=self.redistribution, request=request)
        if seen.output is not None:
            seen.output = seen.output.to(self.value.dtype)
        return seen

    def output(self) -> Tensor:
        """The heads' outputs z (batch, head, query, d_value)."""
        if self.redistribution is not None:
            z = self.attend(Request()).output
            assert z is not None
            return z
        return kernels.output(**self.inputs()).to(self.value.dtype)

    def pattern(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """One exact tile of the pattern (batch, head, row, key), float32."""
        inputs = self.inputs()
        del inputs["v"]
        if self.redistribution is not None:
            return redistributed.pattern(**inputs, move=self.redistribution, rows=rows, keys=keys)
        return kernels.pattern(**inputs, rows=rows, keys=keys)

    def inputs(self) -> dict[str, Any]:
        """The kernels' arguments. A position bias becomes ``key`` further dimensions: q.k + b = [q, b].[k, e]."""
        q, k, v, scale = self.query, self.key, self.value, self.scale
        if self.position_bias is not None:
            if self.softcap is not None:
                raise HeadscopeError("attention with both a softcap and a position bias is not supported")
            batch, kv_heads, keys, _ = k.shape
            wide = torch.promote_types(q.dtype, torch.float32)
            bias = self.position_bias.to(wide).clamp(min=LOWEST).expand(batch, q.shape[1], q.shape[2], keys)
            unit = torch.eye(keys, dtype=wide, device=k.device).expand(batch, kv_heads, -1, -1)
            q, k, scale = torch.cat([q.to(wide) * scale, bias], -1), torch.cat([k.to(wide), unit], -1), 1.0
            v = v.to(wide)
        scores = {"scale": scale, "softcap": self.softcap, "sinks": self.sinks}
        return {"q": q, "k": k, "v": v, "mask": self.mask, **scores, "bias": self.key_bias, "edit": self.score_edit}

    def with_(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def with_key_bias(self, bias: Tensor) -> AttentionCall:
        """A copy in which ``bias`` (batch or 1, head or 1, key) is added to each key's score, and to an earlier bias.

        ``log c`` multiplies the key's weight by c before renormalisation; -inf takes the key away.
        """
        return replace(self, key_bias=bias if self.key_bias is None else self.key_bias + bias)

    def with_score_edit(self, edit: ScoreEdit) -> AttentionCall:
        """A copy whose scores ``edit`` (see ``headscope.kernels.score_edits``) changes last, after an earlier edit.

        Tables that it holds must be on the layer's device.
        """
        return replace(self, score_edit=edit if self.score_edit is None else self.score_edit.then(edit))

    def with_redistribution(self, move: Redistribution) -> AttentionCall:
        """A copy in which ``move`` moves mass between keys after softmax, so after any edit of scores.

        Raises HeadscopeError where an earlier edit did: one ``Redistribution`` can hold different keys for every head.
        """
        if self.redistribution is not None:
            raise HeadscopeError(f"two edits redistribute layer {self.layer} of {self.site}; make them one")
        return replace(self, redistribution=move)


class Handler:
    """What a tracer or an intervention does at each attention call. Every method has a default that does nothing.

    A site runs, for handlers in the order they were entered: every ``edit``, then the attention itself with the
    handlers' ``request``s in the same pass, then every ``edit_output``, then every ``observe``. A tracer therefore sees
    the edited attention and the edited outputs.
    """

    def concerns(self, site: str, layer: int) -> bool:
        """Whether this layer's calls are read or changed at all, the same answer while attached.

        Where no handler is concerned, a site may leave the layer to the model's own attention and call none of them.
        """
        return True

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Change what the layer computes with."""
        return call

    def request(self, call: AttentionCall) -> Request | None:
        """The statistics wanted of this call, or None."""
        return None

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Change the heads' outputs ``z`` (batch, head, query, d_value); return a new tensor or ``z`` itself."""
        return z

    def observe(self, call: AttentionCall, attended: Attended) -> None:
        """Read the statistics asked for by ``request``; ``attended.output`` holds the final heads' outputs."""

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """The model is about to run a forward pass on these keyword arguments."""

    def end_forward(self) -> None:
        """The forward pass that began came to its end."""

    def abort_forward(self) -> None:
        """The forward pass that began did not come to its end (an exception, an interrupt)."""


def run_call(call: AttentionCall, handlers: list[Handler]) -> Tensor:
    """One attention call under ``handlers``: edits, attention with statistics, output edits, observation."""
    return finish_call(edit_call(call, handlers), handlers)


def edit_call(call: AttentionCall, handlers: list[Handler]) -> AttentionCall:
    """``call`` after every handler's ``edit``, in order."""
    for handler in handlers:
        call = handler.edit(call)
    return call


def finish_call(call: AttentionCall, handlers: list[Handler], z: Tensor | None = None) -> Tensor:
    """Attention with statistics, output edits and observation of an edited call.

    ``z`` (batch, head, query, d_value) is what the call gives where the site has computed it already.
    """
    requests = [handler.request(call) for handler in handlers]
    results: list[Attended | None] = []
    for request in requests:
        if request is None:
            results.append(None)
            continue
        result = call.attend(replace(request, output=z is None))
        z = result.output if z is None else z
        results.append(result)
    if z is None:
        z = call.output()
    for handler in handlers:
        z = handler.edit_output(call, z)
    for handler, seen in zip(handlers, results, strict=True):
        if seen is not None:
            seen.output = z
            handler.observe(call, seen)
    return z


def stopped() -> bool:
    """Whether the exception being handled ends a forward pass early on purpose: the layers before it are right."""
    return type(sys.exc_info()[1]).__name__ in STOPS


def origin(model: Any) -> str:
    """``"transformer_lens"`` for a bridge, ``"nnsight"`` for its wrappers, else ``""``; imports neither package."""
    roots = {cls.__module__.partition(".")[0] for cls in type(plain(model)).__mro__}
    return next((name for name in ("transformer_lens", "nnsight") if name in roots), "")


def bare_model(model: Any) -> nn.Module:
    """The Hugging Face module inside load_model's result, a compiled model, a bridge or an nnsight wrapper."""
    site, model = origin(model), plain(model)
    if site == "nnsight" and getattr(model, "dispatched", True) is False:
        raise HeadscopeError("this nnsight model has no weights here yet; call its dispatch() first")
    if site:
        model = model.original_model if site == "transformer_lens" else model._module
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise HeadscopeError(f"expected load_model's result or a Hugging Face model, got {type(model).__name__}")
    bare: nn.Module = plain(inner)
    return bare


def model_device(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the device of its first parameter or, where accelerate keeps that elsewhere between
    calls, the device it is fetched to.

    Raises:
        HeadscopeError: the weights are on no device, and nothing fetches them.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    raise HeadscopeError(f"{type(model).__name__} has no weights (they are on the meta device): load them first")
