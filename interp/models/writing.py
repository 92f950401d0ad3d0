"""What heads write to the residual stream, W_O z head by head, and the unembedding's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.placement import fetched
from headscope.interp.models.projections import output_projections
from headscope.interp.sites.unwrap import bare_model


class HeadWrites:
    """The output projection of every attending layer of the tower that reads or writes text, in their order.

    A projection is called, not read: quantized weights and adapters around it (LoRA) are in it.

    Raises:
        HeadscopeError: an architecture whose projections cannot be told (see ``output_projections``).
    """

    def __init__(self, lm: Any) -> None:
        modules = dict(bare_model(lm).named_modules())
        leaves = output_projections(lm).values()
        self.projections: list[nn.Module] = [modules[leaf.removesuffix(".base_layer")] for leaf in leaves]

    def __len__(self) -> int:
        return len(self.projections)

    def of(self, place: int, z: Tensor) -> Tensor:
        """W_O z of every head by itself, without bias: (n, head, d_model), float32, from z (n, head, d_head)."""
        projection = self.projections[place]
        count, heads, width = z.shape
        example = next(projection.parameters())
        dtype = example.dtype if example.is_floating_point() else torch.float32
        alone = z.new_zeros(count, heads, heads, width)
        index = torch.arange(heads)
        alone[:, index, index] = z
        x = alone.reshape(count, heads, heads * width).to(z.device, dtype)
        with torch.no_grad():
            written: Tensor = projection(x) - projection(torch.zeros_like(x[:1, :1]))
        return written.float()


def unembedding_rows(lm: Any, tokens: Sequence[int]) -> Tensor:
    """The unembedding's rows (token, d_model) of these tokens, float32.

    Raises:
        HeadscopeError: a model without output embedding.
    """
    head = lm.model.get_output_embeddings()
    if head is None:
        raise HeadscopeError(f"{lm.name} has no output embedding, so no token has a direction in its residual stream")
    with fetched(head) as own:
        weight: Any = own.weight
        rows: Tensor = weight.detach()[list(tokens)].float()
    return rows
