"""transformers' attention function while a model is routed: which of our answers a call gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.handler import Handler, edit_call, finish_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface import own
from headscope.interp.sites.huggingface.calls import from_first_key, make_call
from headscope.interp.sites.huggingface.maps import map_of
from headscope.interp.sites.huggingface.parallel import split_of
from headscope.interp.sites.huggingface.passes import check_thread
from headscope.interp.sites.huggingface.state import PLACES, Place, Route
from headscope.interp.sites.huggingface.switch import Switched

Output = tuple[Tensor, Tensor | None]  # (batch, query, head, d_value), and the weights where they were asked for


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Output:
    """transformers' attention function: (batch, head, query, d) in, (batch, query, head, d_value) out."""
    place = PLACES.get(module)
    options = {**kwargs, "scaling": scaling, "dropout": dropout}
    tensors = query, key, value
    if place is None:
        return _elsewhere(module, tensors, attention_mask, options)
    route, name = place.route, place.implementation
    check_thread(route)
    route.called = True
    known = _is_known(route, module, name)
    if not route.is_busy(place.module, place.layer):
        left = own.leave(module, name, *tensors, attention_mask, known=known, **options)
        if left is not None and (not route.maps or left[1] is not None or not known):
            return left[0], left[1]
    if not known:
        return _around(module, place, tensors, attention_mask, options)
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind := query.device.type):
        return _answer(module, place, tensors, attention_mask, options)
    dtype = torch.get_autocast_dtype(kind)  # attention itself would cast them to it
    with torch.autocast(kind, enabled=False):
        return _answer(module, place, (query.to(dtype), key.to(dtype), value.to(dtype)), attention_mask, options)


def _is_known(route: Route, module: nn.Module, name: str) -> bool:
    """Whether ours may stand in for what ``module`` calls; asked once a pass for each class of modules."""
    if route.inside is None:
        return name in route.trusted or own.is_known(module, name)
    found = route.known.get((type(module), name))
    if found is None:
        found = route.known[type(module), name] = name in route.trusted or own.is_known(module, name)
    return found


def _answer(
    module: nn.Module,
    place: Place,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: dict[str, Any],
) -> Output:
    """Our attention, checked where the layer was not, and the map where the pass was asked for it."""
    route, handlers = place.route, _in_force(place.route)
    call = make_call(module, place, *tensors, mask, options["scaling"], options["dropout"], options)
    if route.check is not None:
        route.check(module, place, call, mask, options)
    call, split = from_first_key(call, mask), split_of(route, module, call)
    call = edit_call(call if split is None else split.call(call), handlers)
    weights = map_of(call) if route.maps else None
    z = finish_call(call, handlers)
    return (z if split is None else split.own(z)).transpose(1, 2).contiguous(), weights


def _in_force(route: Route) -> list[Handler]:
    """The handlers of a pass; what backward computes again (gradient checkpointing) is edited again, and read once."""
    if torch._C._current_graph_task_id() == -1:
        return route.handlers
    return [handler for handler in route.handlers if not handler.only_reads]


def _around(
    module: nn.Module,
    place: Place,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: dict[str, Any],
) -> Output:
    """A function that is not known runs itself, and edits change what it gives; nothing stands in for it."""
    handlers = _in_force(place.route)
    call = make_call(module, place, *tensors, mask, options["scaling"], options["dropout"], options)
    split = split_of(place.route, module, call)
    call = call if split is None else split.call(call)
    if edit_call(call, handlers) is not call or any(handler.request(call) is not None for handler in handlers):
        raise own.refuse(module, place.implementation, place.layer)
    left = own.leave(module, place.implementation, *tensors, mask, known=False, **options)
    z = left[0].transpose(1, 2)
    z = z if split is None else split.whole(z, 1)
    for handler in handlers:
        z = handler.edit_output(call, z)
    return (z if split is None else split.own(z)).transpose(1, 2).contiguous(), left[1]


def _elsewhere(
    module: nn.Module, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: dict[str, Any]
) -> Output:
    """A module of another model whose configuration object is also a traced model's attends as it was configured."""
    now = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
    if not isinstance(now, Switched):
        raise HeadscopeError(
            f"{type(module).__name__} attends outside the model that was traced; trace the whole model"
        )
    found = own.leave(module, now.own or "eager", *tensors, mask, known=False, **options)
    return found[0], found[1]
