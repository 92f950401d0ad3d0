"""AttentionCall: what one attention layer computes with. Sites produce it, statistics read it, edits change it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.kernels import attention as kernels
from headscope.kernels.masks import Mask
from headscope.kernels.request import Attended, Request

__all__ = ["AttentionCall", "Handler", "Mask", "bare_model"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention layer at one forward pass.

    ``query`` (batch, head, query, d_head), ``key`` and ``value`` (batch, kv_head, key, ·): after position embedding and
    QK-norm, after the cache update, key/value heads not repeated. ``layer`` is the layer's index within its tower,
    ``site`` the tower's modules as a pattern such as ``"model.layers.*.self_attn"``.
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

    def attend(self, request: Request) -> Attended:
        """Compute ``request``, sharing one pass."""
        return kernels.attend(
            self.query,
            self.key,
            self.value,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            request=request,
        )

    def output(self) -> Tensor:
        """The heads' outputs z (batch, head, query, d_value)."""
        return kernels.output(
            self.query,
            self.key,
            self.value,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def pattern(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """One exact tile of the pattern (batch, head, row, key), float32."""
        return kernels.pattern(
            self.query,
            self.key,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            rows=rows,
            keys=keys,
        )

    def with_(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed."""
        return replace(self, **changes)


class Handler:
    """What a tracer or an intervention does at each attention call. Every method has a default that does nothing.

    A site runs, for handlers in the order they were entered: every ``edit``, then the attention itself with the
    handlers' ``request``s in the same pass, then every ``edit_output``, then every ``observe``. A tracer therefore sees
    the edited attention and the edited outputs.
    """

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


def run_call(call: AttentionCall, handlers: list[Handler]) -> Tensor:
    """One attention call under ``handlers``: edits, attention with statistics, output edits, observation."""
    for handler in handlers:
        call = handler.edit(call)
    requests = [handler.request(call) for handler in handlers]
    results: list[Attended | None] = []
    z: Tensor | None = None
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


def bare_model(model: Any) -> nn.Module:
    """The Hugging Face module inside what ``load_model`` returns, or the module itself."""
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise HeadscopeError(f"expected load_model's result or a Hugging Face model, got {type(model).__name__}")
    return inner


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device
