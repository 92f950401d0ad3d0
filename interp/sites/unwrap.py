"""The Hugging Face module inside whatever a user holds, where its inputs go, and what its forward takes."""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import nn

from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.compiled import plain
from headscope.interp.sites.given import ModelLike, PreTrained

STOPS = ("StopAtLayerException", "EarlyStopException")  # TransformerLens' stop_at_layer, nnsight's tracer.stop()


def stopped() -> bool:
    """Whether the exception being handled ends a forward pass early on purpose: the layers before it are right."""
    return type(sys.exc_info()[1]).__name__ in STOPS


def shown(model: ModelLike) -> Any:
    """What a site is given: the bridge of what ``load_model`` made of one; else ``model``, without torch.compile's."""
    bridge = getattr(model, "bridge", None) if type(model).__module__.startswith("headscope.") else None
    return plain(model if bridge is None else bridge)


def origin(model: ModelLike) -> str:
    """``"transformer_lens"`` for a bridge and what load_model makes of one, ``"nnsight"`` for its wrappers,
    ``"headscope"`` for a model that is written on ``AttentionModule``, else ``""``; imports neither package."""
    held = shown(model)
    roots = {cls.__module__.partition(".")[0] for cls in type(held).__mro__}
    own = isinstance(held, nn.Module) and not hasattr(held, "config") and _is_own(held)
    return "headscope" if own else next((name for name in ("transformer_lens", "nnsight") if name in roots), "")


def _is_own(model: nn.Module) -> bool:
    return any(isinstance(part, AttentionModule) for part in model.modules())


def bare_model(model: ModelLike) -> PreTrained:
    """The Hugging Face module inside load_model's result, a compiled model, a bridge or an nnsight wrapper."""
    wrapped, held = origin(model), shown(model)
    if wrapped == "headscope":
        return cast("PreTrained", held)
    if wrapped == "nnsight" and getattr(held, "dispatched", True) is False:
        raise HeadscopeError("this nnsight model has no weights here yet; call its dispatch() first")
    if wrapped:
        held = held.original_model if wrapped == "transformer_lens" else held._module
    inner = held if isinstance(held, nn.Module) else getattr(held, "model", None)
    if not isinstance(inner, nn.Module):
        raise HeadscopeError(f"expected load_model's result or a Hugging Face model, got {type(held).__name__}")
    return cast("PreTrained", _inside(plain(inner)))  # the one place that says so


def _inside(model: nn.Module) -> nn.Module:
    """The transformers model in a module that holds one: DataParallel and DDP on one device, PEFT, a wrapper class.

    Raises:
        HeadscopeError: it holds several, or runs copies of it on several devices.
    """
    if hasattr(model, "get_base_model"):  # PEFT: its own forward does not go through the model's
        model = model.get_base_model()  # type: ignore[operator]
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise HeadscopeError(
            f"DataParallel runs copies of the model on {len(model.device_ids)} devices, which are not traced: give its "
            "model.module, and call that"
        )
    if hasattr(model, "config") or not isinstance(model, nn.Module):
        return model
    held: list[nn.Module] = []
    _outermost(model, held)
    if len(held) > 1:
        names = " and ".join(type(one).__name__ for one in held[:3])
        raise HeadscopeError(f"{type(model).__name__} holds several models ({names}): give the one that is meant")
    return held[0] if held else model


def _outermost(module: nn.Module, held: list[nn.Module]) -> None:
    """Collect the transformers models inside ``module`` that are inside no other."""
    for child in module.children():
        if hasattr(child, "config") and hasattr(child, "set_attn_implementation"):
            if all(child is not other for other in held):
                held.append(child)
        else:
            _outermost(child, held)


def require_model(model: ModelLike) -> None:
    """Raise HeadscopeError unless this is, or holds, a model whose attention transformers can switch."""
    inner = bare_model(model)
    if origin(model) == "headscope":
        return
    if not origin(model) and any(type(part).__module__.startswith("transformer_lens.") for part in inner.modules()):
        raise HeadscopeError(
            f"this {type(inner).__name__} is the inside of a TransformerBridge, which computes its attention: give the "
            "bridge itself, here or to load_model"
        )
    if getattr(inner, "config", None) is None or not hasattr(inner, "set_attn_implementation"):
        raise HeadscopeError(
            f"{type(inner).__name__} is not a Hugging Face model; load it with load_model or transformers"
        )


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


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return name in inspect.signature(model.forward).parameters
