"""AttentionModule: attention of a model that is written on headscope itself, so that handlers see it at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler, run_call
from headscope.kernels import reference
from headscope.kernels.masks import Mask


class AttentionModule(nn.Module):
    """Base of one layer's attention: a subclass makes queries, keys and values and gives them to ``attend``.

    A model is any ``nn.Module`` with such modules in layers (``layers.0.attention``): ``trace``, ``apply`` and the rest
    take it as it is. What is computed without a handler is the dense definition, or PyTorch's own kernel for it, so
    there is nothing to verify.

    Args:
        num_heads: query heads.
        layer: the layer's index, which stands in the module's name too.
    """

    def __init__(self, num_heads: int, layer: int = 0) -> None:
        super().__init__()
        self.num_heads, self.layer_idx = num_heads, layer
        self.where = ""  # the pattern of its name, which the site tells while handlers are attached
        self.handlers: list[Handler] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, **more: Any) -> Tensor:
        """The heads' outputs z (batch, head, query, d_value).

        Args:
            query: (batch, head, query, d_head), after any rotation.
            key, value: (batch, kv_head, key, d).
            mask: which keys a query sees.
            scale: of q.k.
            **more: further fields of an ``AttentionCall``: ``score_edit``, ``key_bias``, ``sinks``, ``softcap``.
        """
        call = AttentionCall(query, key, value, mask, scale, self.layer_idx, self.where, **more)
        if self.handlers:
            return run_call(call, self.handlers)
        if not torch.is_grad_enabled() or call.inputs().is_plain:
            return call.output()
        return dense_output(call)  # short texts and unusual scores: the faster backward pass


def dense_output(call: AttentionCall) -> Tensor:
    """z by the pattern itself, (batch, head, query, key) at once."""
    scores = call.inputs()
    return reference.pattern(scores) @ call.value.repeat_interleave(scores.group, dim=1)
