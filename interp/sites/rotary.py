"""Rotary position embedding of a model, layer by layer: which pairs of dimensions turn, and how fast.

A query at position i is R(i) q and a key at position j R(j) k, where R turns pair n of dimensions by i theta_n (Su et
al. 2021, arXiv 2104.09864). Scores depend on i - j alone, so turning either by an angle more moves it, exactly, and
turning it back by all of its angle gives the vector before RoPE; what both are turned by beyond that cancels.

Nothing is guessed from a model's name. The frequencies are read from its rotary modules (buffers ``inv_freq``), and one
pass shows what they do: examples of one token, the same, at positions 0, 1, 2 ... It sees itself alone, so that states
are the same in every layer, and the query of position i must be that of position 0, turned. The frequencies, layout and
place of the pairs that say so best are the layer's; a layer where nothing turns (NoPE) has no pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.huggingface.route import paused
from headscope.interp.sites.inputs import special_tokens
from headscope.interp.sites.unwrap import bare_model, model_device, origin, shown

SHOWN = 9  # positions of the pass that shows the rotation
Layer = tuple[str, int]  # a tower's pattern of modules, and the layer


@dataclass(frozen=True, eq=False)
class Rotation:
    """How one layer turns its queries and keys.

    ``frequencies`` (pair,) float32, radians a token; the pairs lie in 2 * pair dimensions from ``first``, as two halves
    or, ``interleaved``, as neighbours. ``scaling`` is what each of q and k is multiplied with (YaRN), ``base`` the
    frequencies' base where the configuration says it.
    """

    frequencies: Tensor
    interleaved: bool = False
    first: int = 0
    scaling: float = 1.0
    base: float | None = None

    def angles(self, positions: Tensor) -> Tensor:
        """The angles (..., pair) of positions, rounded as transformers rounds them, in float64."""
        return (positions[..., None].float() * self.frequencies.to(positions.device)).double()

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        """``x`` (..., d) turned by ``angles`` (..., pair) that broadcast to it, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = self.frequencies.shape[0]
        part = x[..., self.first : self.first + 2 * pairs]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = (part[..., ::2], part[..., 1::2]) if self.interleaved else (part[..., :pairs], part[..., pairs:])
        turned = a * cos - b * sin, b * cos + a * sin
        new = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        before, after = x[..., : self.first], x[..., self.first + 2 * pairs :]
        lead = new.shape[:-1]
        return torch.cat([before.expand(*lead, -1), new, after.expand(*lead, -1)], -1)


def rotations(
    model: ModelLike, tower: str | None, wanted: Callable[[int], bool] = lambda layer: True
) -> dict[Layer, Rotation]:
    """The rotation of every layer of a tower that attends to text and is ``wanted``.

    Raises:
        HeadscopeError: no rotary module; frequencies that change with the length of the text, or positions of several
            dimensions; a layer whose queries do not turn as the module says.
    """
    inner = bare_model(model)
    offered = list(_offered(inner))
    if not offered:
        raise HeadscopeError(
            f"{type(inner).__name__} has no rotary position embedding (no module with a buffer inv_freq), and "
            "positions are edited by turning queries and keys; use a RoPE model (Llama, Qwen, Mistral, Gemma ...)"
        )
    probe = _Probe()
    at = torch.arange(SHOWN, device=model_device(inner))[:, None]
    inputs = {"input_ids": torch.full_like(at, _plain_token(inner)), "position_ids": at}
    with paused(inner), attached(model, probe, tower=tower) as route, torch.no_grad():
        route.handlers[:] = route.handlers[-1:]  # no other edit: the model itself is shown
        if origin(model) == "transformer_lens":
            shown(model)(inputs.pop("input_ids"), **inputs)
        else:
            inner(**inputs, use_cache=False)
    return {layer: _fitting(query, offered, layer) for layer, query in probe.queries.items() if wanted(layer[1])}


class _Probe(Handler):
    """Keeps the queries of a pass."""

    only_reads = True

    def __init__(self) -> None:
        self.queries: dict[Layer, Tensor] = {}

    def edit(self, call: AttentionCall) -> AttentionCall:
        self.queries[call.module, call.layer] = call.query.transpose(0, 2)
        return call


def _plain_token(model: nn.Module) -> int:
    special = special_tokens(model.config)
    return next(i for i in range(3, 4096) if i not in special)


def _offered(model: nn.Module) -> Iterator[Rotation]:
    """The frequencies of every rotary module, once for each kind of layer that it serves.

    Raises:
        HeadscopeError: see ``rotations``.
    """
    for module in model.modules():
        if hasattr(module, "mrope_section") or hasattr(module, "get_rope_index"):
            raise HeadscopeError(
                f"{type(module).__name__} turns by positions of several dimensions (M-RoPE), which columns do not say; "
                "use a model whose positions are numbers"
            )
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name:
                continue
            kind = name.removesuffix("inv_freq")
            parameters = _parameters(module, kind.removesuffix("_"))
            how = str(parameters.get("rope_type", "default"))
            if "dynamic" in how or how == "longrope":
                raise HeadscopeError(
                    f"the frequencies of {type(module).__name__} change with the length of the text ({how}), so keys "
                    "in a cache were turned by others: load the model with a fixed rope_type"
                )
            scaling, base = float(getattr(module, f"{kind}attention_scaling", 1.0)), parameters.get("rope_theta")
            yield Rotation(buffer.float(), scaling=scaling, base=None if base is None else float(base))


def _parameters(module: nn.Module, kind: str) -> Mapping[str, Any]:
    """The configured parameters of a rotary module, for layers of ``kind`` where it serves several."""
    held = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    own = held.get(kind) if kind else None
    found: Mapping[str, Any] = own if isinstance(own, Mapping) else held
    return found


def _fitting(query: Tensor, offered: list[Rotation], layer: Layer) -> Rotation:
    """The rotation that the queries (1, head, position, d) of one token at several positions show.

    Half of the digits of the model's precision is what they may be off by, of float32's in float64 (transformers makes
    cosines and sines in float32); with another base, layout or place they are off by their size.

    Raises:
        HeadscopeError: none of those that are offered.
    """
    width = query.shape[-1]
    tried = [Rotation(torch.zeros(0, device=query.device))]
    for one in offered:
        size = 2 * one.frequencies.shape[0]
        places = {0, width - size} if size <= width else set()
        tried += [replace(one, interleaved=way, first=place) for place in sorted(places) for way in (False, True)]
    at = torch.arange(query.shape[2], device=query.device)
    error, best = min((_off(query, one, at), i) for i, one in enumerate(tried))
    if error > max(torch.finfo(query.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5:
        raise HeadscopeError(
            f"layer {layer[1]} of {layer[0]} does not turn its queries as its rotary module says (off by {error:.2g} "
            "of their size), so positions cannot be edited there: name other layers, or report the architecture"
        )
    return tried[best]


def _off(query: Tensor, rotation: Rotation, at: Tensor) -> float:
    """How far the queries of positions ``at`` are from the first one, turned: relative to the largest."""
    expected = rotation.turn(query[:, :, :1], rotation.angles(at))
    return float((query.to(expected.dtype) - expected).abs().max() / query.abs().max().clamp(min=1e-30))
