"""The way from the residual stream to a layer's queries and keys, with every norm on it held still.

It is affine then: the layer's norm, the projections (adapters included), QK-norm, and position embedding, which at one
position is a fixed rotation. The layer's own attention module computes it, one position at a time, with its attention
function replaced by one that keeps what it is given; no name is assumed, and what comes out is compared with what the
model attended with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.projections import routed
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.layout import stream_of
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.writers import LayerPath, is_linear, norm_between, watching


@dataclass(eq=False)
class Reader:
    """One layer's attention ``module`` as it was called on a text: its arguments, and the ``norm`` before it."""

    lm: LanguageModel
    module: nn.Module
    norm: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Tensor

    def parts(self, written: Tensor, whole: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys at place ``at`` of the text that vectors ``written`` (source, d_model) have, as parts of the
        stream ``whole`` (d_model,) there: (source + 1, head, d_head) and (source + 1, kv_head, d_head), the last row
        being constant (biases, shifts); and those of the whole stream as the module gives them."""
        zero = torch.zeros_like(whole)[None]
        shift, lines = zero, written
        read = whole[None]
        if self.norm is not None:
            x = whole[None, None].to(self.given.dtype)
            frozen = FrozenNorm.of(self.norm, x)
            lines = frozen.linear(written[None], frozen.scale(x))[0]
            shift = frozen.shift.reshape(1, -1).to(zero)
            with torch.no_grad():
                read = self.norm(x)[0].to(whole)
        (query, key, _), leaves = self._run(read, at)
        with self._still(leaves):
            (q, k, _), _ = self._run(torch.cat([lines, shift, zero]), at)
        q[:-2], k[:-2] = q[:-2] - q[-1], k[:-2] - k[-1]
        return q[:-1], k[:-1], query[0], key[0]

    def matrices(self, fold: bool) -> tuple[Tensor, Tensor, Tensor]:
        """W_Q (head, d_head, d_model), W_K and W_V (kv_head, ·, d_model), where positions turn nothing (at place 0):
        with ``fold`` the gain (and centring) of the layer's norm on their right. Of QK-norm the gain is in W_Q and W_K;
        its scale, a number for each vector, is left out."""
        unit = torch.eye(self.given.shape[-1], device=self.given.device, dtype=self.given.dtype)
        lines = unit
        if fold and self.norm is not None:
            lines = FrozenNorm.of(self.norm, unit[None, :1]).linear(unit[None], unit.new_ones(1))[0].to(unit)
        _, leaves = self._run(lines[:1], 0)
        with self._still(leaves, plain=True):
            whole, _ = self._run(torch.cat([lines, torch.zeros_like(unit[:1])]), 0)
        q, k, v = ((x[:-1] - x[-1]).permute(1, 2, 0) for x in whole)
        return q, k, v

    def _run(self, rows: Tensor, at: int) -> tuple[tuple[Tensor, ...], dict[nn.Module, tuple[Tensor, Tensor]]]:
        """Queries, keys and values (row, head, ·) of ``rows`` (row, d_model), each as the only token, at that place;
        and what went in and out of the module's leaves."""
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        kept: list[tuple[Tensor, ...]] = []

        def attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Any:
            kept.append((query[:, :, 0], key[:, :, 0], value[:, :, 0]))
            return value.new_zeros(len(query), 1, query.shape[1], value.shape[3]), None

        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and not kept:
                seen[module] = (args[0], output)

        x = rows[:, None].to(self.given.dtype)
        args, kwargs = (_there(each, self.given, x, at) for each in (self.args, self.kwargs))
        kwargs |= {name: None for name in ("attention_mask", "past_key_values") if name in kwargs}
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            for leaf in (part for part in self.module.modules() if not any(part.children())):
                stack.callback(leaf.register_forward_hook(look).remove)
            stack.enter_context(routed(self.lm.inner, attend))
            stack.enter_context(torch.no_grad())
            self.module(*args, **kwargs)
        wide = torch.promote_types(kept[0][0].dtype, torch.float32)
        return tuple(x.to(wide) for x in kept[0]), seen

    @contextmanager
    def _still(self, leaves: Mapping[nn.Module, tuple[Tensor, Tensor]], plain: bool = False) -> Iterator[None]:
        """Norms inside the module keep the scale that they had on the whole stream (``plain``: a scale of 1)."""
        with ExitStack() as stack:
            for leaf, (x, out) in leaves.items():
                if is_linear(leaf, x, out):
                    continue
                norm = FrozenNorm.of(leaf, x)
                scale = x.new_ones(()) if plain else norm.scale(x)

                def hold(_: Any, args: Any, output: Tensor, norm: FrozenNorm = norm, scale: Tensor = scale) -> Tensor:
                    return (norm.linear(args[0], scale) + norm.shift).to(output.dtype)

                stack.callback(leaf.register_forward_hook(hold).remove)
            yield


@contextmanager
def reading(lm: LanguageModel, path: LayerPath) -> Iterator[list[Reader]]:
    """Keeps how a layer's attention module is called in the forward pass inside the block (one example).

    Raises:
        HeadscopeError: the layer does not attend, or something but a norm stands before its attention.
    """
    if path.mixer is None:
        raise HeadscopeError(f"layer {path.layer} of {lm.name} does not attend: choose another")
    with uncompiled(), watching(lm.inner) as seen, torch.no_grad():
        lm.inner(input_ids=torch.arange(1, 5, device=lm.device)[None] % lm.info.vocab_size)
    into, read = seen[path.module][0], seen[path.mixer][0]
    norm = None if torch.equal(into, read) else norm_between(into, read, path.module, seen)
    if norm is None and not torch.equal(into, read):
        raise HeadscopeError(
            f"{lm.name}: attention in layer {path.layer} does not read the residual stream as it is or through one "
            "norm, so its scores are not split over what wrote the stream"
        )
    found: list[Reader] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = stream_of(args, kwargs)
        assert x is not None
        found.append(Reader(lm, module, norm, args, kwargs, x))

    hook = path.mixer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _there(given: Any, stream: Tensor, rows: Tensor, at: int) -> Any:
    """Arguments of a call on a whole text as those of a call on ``rows`` at one of its places."""
    if given is stream:
        return rows
    if isinstance(given, dict):
        return {name: _there(each, stream, rows, at) for name, each in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_there(each, stream, rows, at) for each in given)
    if isinstance(given, Tensor):
        length, dim = stream.shape[1], min(1, given.dim() - 1)
        return given.narrow(dim, at, 1) if given.dim() and given.shape[dim] == length else given
    return given
