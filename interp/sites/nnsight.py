"""The nnsight site: tracers and interventions on models wrapped by nnsight, here or on a server.

Here: nnsight runs the Hugging Face module that it wraps without changing it, so ``trace`` and ``apply`` take a wrapper
as they take the module, around its ``trace`` and ``generate`` contexts. This file is for the other way, ``run``: one
traced prompt whose body uses nothing but nnsight's graph and torch, so that it can be sent to a server. It reads
queries, keys and values from ``.source`` and edits head outputs at the input of the output projection; statistics are
computed from what came back, and every layer's output is compared with what its queries, keys and values give.
Operation names are discovered in each module's source, never assumed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler, edit_call, finish_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.attachment import Attachment
from headscope.interp.sites.huggingface.dense_masks import rule_of
from headscope.interp.sites.towers import parse_name
from headscope.interp.sites.transformer_lens.verify import bound_of
from headscope.interp.sites.unwrap import origin
from headscope.kernels.masks import Mask

CALL = re.compile(r"attention_interface_\d+$")
REFUSED = ("dropout", "position_bias", "cache")
PLAIN = ("scaling", "softcap", "s_aux", "is_causal")
Affine = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class Place:
    """Where one layer attends: module and envoy, the operation of its source that attends, its output projection."""

    module: nn.Module
    envoy: Any
    operation: str
    projection: str
    path: str


def places(model: Any) -> list[Place]:
    """Every attention call of an nnsight wrapper that follows transformers' attention interface.

    Works on a model without weights. Raises HeadscopeError where none is found.
    """
    require(model)
    found = []
    for path, module in model._module.named_modules():
        if "attention_interface" not in inspect.unwrap(type(module).forward).__code__.co_varnames:
            continue
        envoy = model
        for part in path.split("."):
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        names = list(envoy.source.names)
        last = max((i for i, name in enumerate(names) if CALL.match(name)), default=None)
        if last is None:
            continue
        called = [name.removeprefix("self_").rpartition("_")[0] for name in names[last + 1 :]]
        children = dict(module.named_children())
        projection = next((name for name in called if name in children), "")
        found.append(Place(module, envoy, names[last], projection, path))
    if not found:
        kind = type(model._module).__name__
        raise HeadscopeError(
            f"{kind} has no attention call that nnsight's source shows; trace it as a Hugging Face model"
        )
    return found


def run(model: Any, *inputs: Any, handlers: Sequence[Handler] = (), remote: Any = False, **kwargs: Any) -> Tensor:
    """Trace one prompt with nnsight's graph alone, under ``handlers`` in order; the logits (batch, query, token).

    Tracers record as they do inside ``trace``: make them with ``Tracer(model, statistics)``. Interventions may change
    head outputs by a factor and an offset per head and dimension (zero and mean ablation, scaling, steering).

    Args:
        model: an nnsight ``TransformersModel``, ``LanguageModel`` or ``NNsight`` wrapper; it needs no weights here if
            remote.
        inputs: what ``model.trace`` takes, e.g. a prompt; keyword arguments go there too (``input_ids=...``).
        handlers: tracers and interventions.
        remote: nnsight's own: True for NDIF, ``"local"`` to rehearse the serialisation in this process.

    Raises:
        HeadscopeError: an intervention that edits inside attention or differs between queries, or an attention layer
            that does more than an AttentionCall says (a position bias, a gate before the output projection).
    """
    save = require(model).save
    at = places(model)
    layers = [(place.envoy, place.operation, _projection(place)) for place in at]
    shown = [Attachment.of(model._module, handler) for handler in handlers]
    edits = [_affine(shown, place, model._module.config.get_text_config()) for place in at]
    options = {} if remote is False else {"remote": remote}
    seen, masks, asked, logits = _through_graph(model, inputs, {**kwargs, **options}, layers, edits, save)
    try:
        _observe(at, edits, seen, masks, asked, shown)
    except BaseException:
        for handler in shown:
            handler.abort_forward()
        raise
    for handler in shown:
        handler.end_forward()
    return logits


def _through_graph(
    model: Any, inputs: tuple[Any, ...], options: dict[str, Any], layers: list[Any], edits: list[Affine], save: Any
) -> tuple[list[Any], dict[int, Any], Any, Tensor]:
    """What every layer attends with and gives, the masks, the model's inputs, and the logits."""
    plain = (*PLAIN, *REFUSED)
    with torch.no_grad():
        with model.trace(*inputs, **options):  # its body travels: nnsight, torch and plain values only
            seen, masks, asked = save([]), save({}), save(model.inputs)
            for (envoy, operation, projection), edit in zip(layers, edits, strict=True):
                positional, named = envoy.source.node(operation).inputs
                mask = positional[4] if len(positional) > 4 else named.get("attention_mask")
                masks[id(mask)] = mask
                kept = {name: value for name, value in named.items() if name in plain and value is not None}
                z = envoy.source.node(operation).output[0]
                gap = None
                if projection is not None:
                    entering = projection.input
                    gap = (entering - z.reshape(entering.shape)).abs().max()
                    if edit is not None:
                        projection.input = entering * edit[0].to(entering) + edit[1].to(entering)
                seen.append((*positional[1:4], id(mask), kept, z, gap))
            logits = save(model.output.logits)
    return seen, masks, asked, logits


def require(model: Any) -> Any:
    """The nnsight package, or a HeadscopeError where it is not installed or ``model`` is not a wrapper of its."""
    try:
        package = import_module("nnsight")
    except ImportError as error:
        raise HeadscopeError("nnsight is not installed; pip install 'headscope[sites]'") from error
    if origin(model) != "nnsight" or not isinstance(getattr(model, "_module", None), nn.Module):
        raise HeadscopeError(f"expected an nnsight wrapper such as TransformersModel, got {type(model).__name__}")
    return package


def _projection(place: Place) -> Any:
    return getattr(place.envoy, place.projection) if place.projection else None


def _width(projection: Any) -> int:
    """How wide a projection's input is; packed 4-bit weights have another shape, GPT-2's Conv1D the other order."""
    wide = getattr(projection, "in_features", None)
    return int(projection.weight.shape[0] if wide is None else wide)


def _affine(handlers: Sequence[Attachment], place: Place, config: Any) -> Affine:
    """What the handlers do to this layer's z, as a factor and an offset (head * d_value), or None for nothing."""
    where, layer = parse_name(place.path, place.module)
    heads = config.num_attention_heads
    for handler in handlers:
        handler.inner.check(handler.size.depth, handler.size.most_heads or heads)
    projection = getattr(place.module, place.projection) if place.projection else None
    width = heads if projection is None else _width(projection)
    probe = torch.randn(1, heads, 4, width // heads, generator=torch.Generator().manual_seed(0))
    call = AttentionCall(probe, probe, probe, Mask.causal(), 1.0, layer, where)

    def edited(z: Tensor) -> Tensor:
        for handler in handlers:
            z = handler.edit_output(call, z)
        return z

    if edit_call(call, list(handlers)) is not call:
        raise HeadscopeError(
            "this intervention edits inside attention, which nnsight's graph cannot do remotely; load the weights "
            "and use `with apply(model, ...)` around model.trace"
        )
    offset = edited(torch.zeros_like(probe))
    factor = edited(torch.ones_like(probe)) - offset
    if torch.equal(edited(probe), probe) and not offset.any():
        return None
    affine = torch.allclose(edited(probe), probe * factor + offset, atol=1e-5)
    if not affine or any(bool((x != x[:, :, :1]).any()) for x in (factor, offset)):
        raise HeadscopeError(
            "this intervention is not a factor and an offset per head, so it cannot be sent to a server"
        )
    if not place.projection:
        raise HeadscopeError(
            f"{place.path} calls no output projection of its own, so its heads cannot be edited remotely"
        )
    return factor[0, :, 0].flatten(), offset[0, :, 0].flatten()


def _observe(
    at: list[Place],
    edits: list[Affine],
    seen: list[Any],
    masks: dict[int, Any],
    asked: Any,
    handlers: Sequence[Handler],
) -> None:
    """Hand what came back to the handlers, layer by layer, after comparing it with the layer's own output."""
    given = {**dict(asked[1]), **({"input_ids": asked[0][0]} if asked[0] else {})}
    padding = given.get("attention_mask")
    real = padding.bool() if isinstance(padding, Tensor) and padding.dim() == 2 else None
    rules: dict[int, Mask] = {}
    for handler in handlers:
        handler.begin_forward(given)
    for place, edit, (query, key, value, mask_id, named, z, gap) in zip(at, edits, seen, strict=True):
        if key.shape[2] != query.shape[2]:
            raise HeadscopeError("nnsight's graph was asked for a cached pass; `run` traces whole prompts only")
        if mask_id not in rules:
            causal = named.get("is_causal", getattr(place.module, "is_causal", False))
            rules[mask_id] = _rule(masks[mask_id], causal, real)
        for name in REFUSED:
            if named.get(name) is not None and not (name == "dropout" and not named[name]):
                raise HeadscopeError(f"{place.path} attends with {name!r}, which cannot be traced remotely")
        where, layer = parse_name(place.path, place.module)
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=rules[mask_id],
            scale=float(named.get("scaling", query.shape[-1] ** -0.5)),
            layer=layer,
            module=where,
            softcap=named.get("softcap"),
            sinks=named.get("s_aux"),
        )
        _check(place, call, z.transpose(1, 2), None if edit is None else gap)
        finish_call(call, list(handlers), z.transpose(1, 2))


def _rule(mask: Any, causal: bool, real: Tensor | None) -> Mask:
    if mask is None:
        return Mask.causal() if causal else Mask.full()
    if mask.dim() != 4:
        raise HeadscopeError("this model's attention takes a packed mask; set attn_implementation to 'sdpa' or 'eager'")
    return rule_of(mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2, real=real)


def _check(place: Place, call: AttentionCall, z: Tensor, gap: Tensor | None) -> None:
    rows = torch.arange(z.shape[2], device=z.device)
    real = call.mask.query_is_real(rows)
    difference = (call.output() - z).float().abs().amax((1, 3))
    difference = difference if real is None else difference.masked_fill(~real, 0.0)
    if not float(difference.max()) <= bound_of(call) * max(1.0, float(call.value.float().abs().max())):
        raise HeadscopeError(
            f"{place.path} computes more than nnsight's graph shows of its attention (difference "
            f"{float(difference.max()):.2g}); load the weights and trace it as a Hugging Face model"
        )
    if gap is not None and float(gap) > 0:
        raise HeadscopeError(
            f"{place.path} changes its heads' outputs before {place.projection}, so they cannot be edited remotely"
        )
