"""The text that a model is verified on."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.sites.unwrap import model_device

LONGEST_WINDOW = 1024  # a sliding window up to this size is exceeded by the verification prompt
SHORT = 24  # tokens of a prompt where no window asks for more


def prompt(model: nn.Module) -> dict[str, Any]:
    """Two rows of random tokens, one padded on the left and one on the right."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    windows = [w for w in (getattr(config, "sliding_window", None),) if isinstance(w, int) and 0 < w <= LONGEST_WINDOW]
    length = max([SHORT, *(w + 8 for w in windows)])
    limit = getattr(config, "max_position_embeddings", None)
    length = min(length, limit) if isinstance(limit, int) and limit > 0 else length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    special = _special_tokens(model.config)
    ids = torch.where(torch.isin(ids, special), int(_first_plain(special)), ids)
    real = torch.ones_like(ids)
    real[0, :3] = 0
    real[1, -2:] = 0
    device = model_device(model)
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": real.to(device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :12].flip(0).to(device)
    return {**inputs, "use_cache": False}


def _special_tokens(config: Any) -> Tensor:
    """Tokens that stand for images or sound, which a prompt of text must not hold."""
    found = [v for k, v in config.to_dict().items() if re.search(r"(token_id|token_index)$", k) and isinstance(v, int)]
    return torch.tensor(found or [-1])


def _first_plain(special: Tensor) -> int:
    return next(i for i in range(3, 4096) if i not in special.tolist())
