"""A model's tokens: ordinary ones at random, the special ones at a sequence's start, and how many fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel


def random_tokens(lm: LanguageModel, count: int, seed: Sequence[int]) -> Tensor:
    """``count`` different token ids (count,), uniform over the vocabulary without special and added tokens.

    Different, so that in a repeated sequence every token has exactly one earlier occurrence.
    """
    size, special = lm.info.vocab_size, {*config_tokens(lm)}
    if lm.tokenizer is not None:
        size = min(size, len(lm.tokenizer))
        special |= {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    usable = np.setdiff1d(np.arange(size), sorted(special))
    if count > len(usable):
        raise HeadscopeError(f"{count} different tokens are asked for, but {lm.name} has {len(usable)} ordinary ones")
    return torch.from_numpy(np.random.default_rng(seed).choice(usable, count, replace=False)).long()


def config_tokens(lm: LanguageModel) -> list[int]:
    """The BOS, EOS and padding ids that the model's configuration names."""
    config = lm.inner.config.get_text_config()
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    flat = [i for one in named for i in (one if isinstance(one, list | tuple) else [one])]
    return [i for i in flat if isinstance(i, int) and 0 <= i < lm.info.vocab_size]


def bos_tokens(lm: LanguageModel) -> list[int]:
    """The tokenizer's BOS token (the configuration's for a model without tokenizer); empty where there is none."""
    config = lm.inner.config.get_text_config()
    bos = getattr(config, "bos_token_id", None) if lm.tokenizer is None else lm.tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and 0 <= bos < lm.info.vocab_size else []


def start_tokens(lm: LanguageModel) -> list[int]:
    """The special tokens that the tokenizer puts before a text by itself."""
    plain, whole = body_tokens(lm, "a"), lm.tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:at])


def body_tokens(lm: LanguageModel, text: str) -> list[int]:
    """A text's token ids, without the tokenizer's special tokens."""
    tokenizer = lm.required_tokenizer()
    if not isinstance(text, str):
        raise HeadscopeError(f"a text is expected, not {type(text).__name__}: pass a string or a list of strings")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_length(lm: LanguageModel, length: int) -> None:
    """Refuse sequences that are empty or longer than the model's context."""
    limit = lm.info.context_length
    if length < 1:
        raise HeadscopeError(f"sequences of {length} tokens are asked for: take at least 1")
    if limit is not None and length > limit:
        raise HeadscopeError(
            f"sequences of {length} tokens are longer than the context of {lm.name} ({limit}): ask for fewer tokens"
        )
