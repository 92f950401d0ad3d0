"""A model whose attention is written out from a specification, in float64: RoPE and softmax by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

LAYERS, HEADS, D_HEAD = 2, 4, 8

# (layer, q, k) before RoPE, (batch, head, position, d_head) each, heads repeated -> pattern (batch, head, query, key)
Hand = Callable[[int, Tensor, Tensor], Tensor]


def tiny(**changes: Any) -> Any:
    """Two layers of four heads, two of keys and values, float32, with attention far from uniform (wide weights)."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, head_dim=D_HEAD, max_position_embeddings=128, vocab_size=64)
    groups = dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2, initializer_range=0.3)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**sizes, **groups, **ends, **changes)).eval()


def rope(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """``x`` (..., d) turned to ``positions`` (...), as Llama lays its pairs, in float64."""
    half = x.shape[-1] // 2
    angle = positions.double()[..., None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x.double()[..., :half], x.double()[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@contextmanager
def by_hand(hand: Hand) -> Iterator[None]:
    """Inside the block eager attention of llama gets no RoPE, and uses the pattern that ``hand`` makes of q and k."""

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        p = hand(module.layer_idx, query.double(), k)
        return (p @ v).transpose(1, 2).to(query.dtype).contiguous(), p

    own = modeling_llama.eager_attention_forward, modeling_llama.apply_rotary_pos_emb
    try:
        modeling_llama.eager_attention_forward = eager
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)
        yield
    finally:
        modeling_llama.eager_attention_forward, modeling_llama.apply_rotary_pos_emb = own


def expected(model: Any, ids: Tensor, hand: Hand) -> Tensor:
    """Logits of one unpadded batch under ``hand``."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    with by_hand(hand), torch.no_grad():
        return other(input_ids=ids, use_cache=False).logits


def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    if mask is not None:
        at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options |= {"attention_mask": mask, "position_ids": at}
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.fixture
def model() -> Any:
    """A llama with grouped key/value heads."""
    return tiny()


@pytest.fixture
def dense() -> SimpleNamespace:
    """The functions of this file, for tests."""
    return SimpleNamespace(tiny=tiny, rope=rope, expected=expected, logits=logits, softmax=softmax)
