"""Llamas of published shapes with random weights, and the memory that a long forward pass of them takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the length it is measured at; ``chunk`` tokens of a prompt run at once (0: all)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    tokens: int
    chunk: int = 0

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def config(self, tokens: int) -> LlamaConfig:
        """The configuration, for positions up to ``tokens``; no rope scaling, which random weights have no use for."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=tokens,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )


SHAPES = {
    "70b": Shape(80, 8192, 28672, 64, 8, 128256, False, tokens=131072),  # Llama-3.1-70B
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, False, tokens=131072),  # Llama-3.1-8B
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, True, tokens=1 << 20, chunk=1 << 16),  # Llama-3.2-1B
    "tiny": Shape(2, 64, 128, 4, 2, 256, True, tokens=512),
    "tiny-8": Shape(2, 128, 256, 16, 8, 256, True, tokens=512),  # heads for eight processes
}


def random_model(shape: Shape, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The model in ``dtype``, made where it runs."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape.config(tokens)).eval()
    finally:
        torch.set_default_dtype(before)


def estimate(shape: Shape, tokens: int, chunk: int, values: int, every: int = 1) -> dict[str, float]:
    """GiB of a traced pass: weights, cache, the widest moment of a layer, and ``values`` float32 row statistics.

    The widest moment is the MLP's: gate, its activation, up, their product and the residual stream. Appending to a
    cache holds the longest tensor twice. Statistics wait in host memory: ``"device"`` is all but them.
    """
    kv = shape.kv_heads * shape.d_head
    layer = shape.hidden * (2 * shape.hidden + 2 * kv) + 3 * shape.hidden * shape.intermediate
    weights = shape.layers * layer + shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    cached = 2 * tokens * kv if chunk < tokens else 0
    parts = {
        "weights": 2 * weights,
        "cache": 2 * cached * shape.layers + cached,
        "widest moment": 2 * chunk * (4 * shape.intermediate + 2 * shape.hidden),
        "statistics": 4 * values * shape.layers * shape.heads * tokens // every,
    }
    device = sum(size for name, size in parts.items() if name != "statistics")
    return {name: size / GIB for name, size in parts.items()} | {"device": device / GIB}
