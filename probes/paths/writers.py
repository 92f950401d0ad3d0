"""The way from heads and MLPs to the residual stream and on to the logits, as the model's own modules.

Found by watching one short forward pass; no name is assumed. Heads reach the stream through a linear module (an
adapter's sum included), straight or through one norm after it (Gemma 2 and 3, OLMo 2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.projections import output_projections
from headscope.interp.models.unembedding import final_modules
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.layout import StreamLayer, output_of, stream_layers, stream_of
from headscope.interp.sites.sizes import tower_size

Seen = dict[nn.Module, tuple[Tensor, Tensor]]  # what went in, what came out


@dataclass(frozen=True, eq=False)
class Writer:
    """A module that is linear up to a bias, and the ``norm`` between it and the stream, if there is one."""

    projection: nn.Module
    norm: nn.Module | None
    device: torch.device

    def back(self, direction: Tensor, width: int) -> Tensor:
        """``direction`` (batch, d_model) of the projection's output as one of its input (batch, width): W^T d."""
        with torch.enable_grad():
            x = self._zeros(len(direction), width).requires_grad_()
            y: Tensor = self.projection(x)
            (found,) = torch.autograd.grad((y * direction[:, None].to(y)).sum(), x)
        return found[:, 0].to(direction)

    def bias(self, width: int) -> Tensor:
        """What the projection gives of nothing (d_model,)."""
        with torch.no_grad():
            found: Tensor = self.projection(self._zeros(1, width))[0, 0]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def apart(self, z: Tensor, heads: int) -> Tensor:
        """W z of each head alone (batch, head, d_model), of heads side by side ``z`` (batch, width); no bias."""
        alone = z.new_zeros(len(z), heads, heads, z.shape[-1] // heads)
        index = torch.arange(heads, device=z.device)
        alone[:, index, index] = z.reshape(len(z), heads, -1)
        with torch.no_grad():
            written: Tensor = self.projection(alone.flatten(2)) - self.projection(self._zeros(1, z.shape[-1]))
        return written.to(torch.promote_types(written.dtype, torch.float32))

    def _zeros(self, batch: int, width: int) -> Tensor:
        weight = next(self.projection.parameters())
        device = self.device if weight.device.type == "meta" else weight.device  # offloaded: fetched for the call
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32  # quantized weights are integers
        return torch.zeros(batch, 1, width, device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class LayerPath:
    """One layer: its ``module``, the ``mixer`` in it that attends, its query ``heads`` and their way to the stream
    (None, 0 and None: it does not attend), and the module whose output its MLP adds to the stream (None: nothing adds
    up with it)."""

    layer: int
    module: nn.Module
    mixer: nn.Module | None
    heads: int
    attention: Writer | None
    mlp: nn.Module | None
    stream: StreamLayer


@dataclass(frozen=True, eq=False)
class Paths:
    """Every layer, the final ``norm`` and the ``unembedding``."""

    layers: list[LayerPath]
    norm: nn.Module
    unembedding: nn.Module


def find_paths(lm: LanguageModel) -> Paths:
    """The paths of a model that reads text.

    Raises:
        HeadscopeError: heads that do not reach the stream like that (a factor on what they write, as in Granite), or no
            single norm before an output embedding.
    """
    model = lm.inner
    names = output_projections(lm)
    norm, head = final_modules(lm)
    with uncompiled(), watching(model) as seen, torch.no_grad():
        model(input_ids=torch.arange(1, 5, device=lm.device)[None] % lm.info.vocab_size)
    size = tower_size(lm)
    modules = dict(model.named_modules())
    found = []
    for layer in stream_layers(model, size.tower):
        parts = {part for part in layer.module.modules()}
        own = [(attention, leaf) for attention, leaf in names.items() if modules[attention] in parts]
        writer = None
        if own:
            projection = _whole(modules, *own[0], seen)
            writer = Writer(projection, _norm_after(lm, own[0][0], projection, layer, seen), lm.device)
        heads = int(size.heads.get(layer.layer) or lm.info.heads) if own else 0
        mixer = modules[own[0][0]] if own else None
        mlp = layer.writers.get("mlp_out")
        found.append(LayerPath(layer.layer, layer.module, mixer, heads, writer, mlp, layer))
    return Paths(found, norm, head)


def norm_between(first: Tensor, last: Tensor, inside: nn.Module, seen: Seen) -> nn.Module | None:
    """The leaf of ``inside`` that made ``last`` of ``first``."""
    for module in inside.modules():
        if module in seen and not any(module.children()):
            into, out = seen[module]
            if torch.equal(into, first) and out.shape == last.shape and torch.equal(out, last):
                return module
    return None


def _norm_after(
    lm: LanguageModel, attention: str, projection: nn.Module, layer: StreamLayer, seen: Seen
) -> nn.Module | None:
    if projection in layer.carriers:
        return None
    writer = layer.writers.get("attn_out")
    norm = None if writer is None else norm_between(seen[projection][1], seen[writer][1], layer.module, seen)
    if norm is None:
        raise HeadscopeError(
            f"{lm.name}: {attention} does not add its heads' outputs to the residual stream as they are or through a "
            "norm (a factor comes between): direct logit attribution is not defined here; ablate heads instead"
        )
    return norm


def _whole(modules: dict[str, nn.Module], attention: str, leaf: str, seen: Seen) -> nn.Module:
    """The outermost module of an attention module that reads what the projection ``leaf`` reads, and is linear in it.

    That is the projection itself or what stands around it: under LoRA the sum of ``base_layer`` and the adapter.
    """
    found, name = modules[leaf], leaf.rpartition(".")[0]
    while name.startswith(f"{attention}."):
        around = modules[name]
        if (
            around not in seen
            or not torch.equal(seen[around][0], seen[found][0])
            or not is_linear(around, *seen[around])
        ):
            break
        found, name = around, name.rpartition(".")[0]
    return found


def is_linear(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Whether ``module``, which gave ``out`` of ``x``, is linear up to a shift."""
    with torch.no_grad():
        shift = module(torch.zeros_like(x))
        apart = (module(2 * x) - shift).float() - 2 * (out - shift).float()
    return bool(apart.norm() <= 0.02 * out.float().norm())


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """What went into and came out of every module (batch, query, ·) in the forward passes inside the block."""
    seen: Seen = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        into, out = stream_of(args, kwargs), output_of(output)
        if into is not None and out is not None:
            seen[module] = (into, out)

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
