"""What passed chosen positions on the way: only these rows are held, at any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.sites.layout import output_of, stream_of
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.writers import LayerPath, Paths


@dataclass(eq=False)
class Rows:
    """Rows (batch, row, ·) of one forward pass, by layer: heads side by side (``z``), what a norm after attention was
    given (``mixed``), what MLPs added to the stream (``mlp``), the stream before layers (``before``), and before the
    final norm (``last``)."""

    z: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    before: dict[int, Tensor] = field(default_factory=dict)
    last: Tensor = field(default_factory=lambda: torch.zeros(0))

    def after(self, layer: int) -> Tensor:
        """The stream after a layer."""
        return self.before.get(layer + 1, self.last)


@contextmanager
def rows(paths: Paths, at: Tensor) -> Iterator[Rows]:
    """Keeps rows ``at`` (batch, row) of the forward pass inside the block; ``at`` are places in the padded batch."""
    found = Rows()

    def pick(x: Tensor) -> Tensor:
        x = x.reshape(at.shape[0], -1, x.shape[-1])
        index = at.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.detach().gather(1, index)

    with ExitStack() as stack:

        def before(module: nn.Module, keep: Any) -> None:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = stream_of(args, kwargs)
                keep(pick(args[0] if x is None else x))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def after(module: nn.Module, keep: Any) -> None:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                x = output_of(output)
                keep(pick(output if x is None else x))

            stack.callback(module.register_forward_hook(hook).remove)

        for path in paths.layers:
            before(path.module, lambda x, layer=path.layer: found.before.update({layer: x}))
            if path.attention is not None:
                before(path.attention.projection, lambda x, layer=path.layer: found.z.update({layer: x}))
                if path.attention.norm is not None:
                    before(path.attention.norm, lambda x, layer=path.layer: found.mixed.update({layer: x}))
            if path.mlp is not None:
                after(path.mlp, lambda x, layer=path.layer: found.mlp.update({layer: x}))
        before(paths.norm, lambda x: setattr(found, "last", x))
        yield found


def wrote(path: LayerPath, found: Rows, row: int) -> tuple[Tensor, Tensor]:
    """What each head of a layer added to the stream at one row (batch, head, d_model), its norm's scale frozen, and
    what attention added beside (batch, d_model): biases, a norm's shift."""
    writer, z = path.attention, found.z[path.layer][:, row]
    assert writer is not None
    heads, bias = writer.apart(z, path.heads), writer.bias(z.shape[-1])
    if writer.norm is None:
        return heads, bias.expand(len(z), -1)
    x = found.mixed[path.layer][:, row]
    norm = FrozenNorm.of(writer.norm, x[:, None])
    scale = norm.scale(x[:, None])  # (batch, 1, 1)
    return norm.linear(heads, scale), (norm.linear(bias[None, None], scale) + norm.shift)[:, 0]
