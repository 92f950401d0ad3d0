"""Greedy answers to needle prompts, and their recall: independent of tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import known_boundary, prompt_boundary


def prefill(lm: LanguageModel, ids: Any) -> Any:
    """Run the model on a prompt's token ids, all but the last, without statistics; returns its key/value cache.

    The last token is left for ``decode``, whose first pass chooses the answer's first token. Edits that act while
    reading or while answering are told where the prompt ends.

    Raises:
        HeadscopeError: no token, or a model that keeps no cache.
    """
    if not len(ids):
        raise HeadscopeError("a prompt needs at least two tokens")
    with said_boundary(len(ids) + 1):
        output = lm.forward(torch.tensor([list(ids)]), logits=1, cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise HeadscopeError(f"{lm.name} returns no key/value cache, which decoding needs; use a causal language model")
    return cache


def decode(lm: LanguageModel, cache: Any, last: int, max_new_tokens: int, *, newline_stop: bool = False) -> list[int]:
    """Continue a cache greedily from the prompt's ``last`` token: the emitted ids, with the one that ended the answer.

    Stops at a token that ends a text or a turn (``stop_tokens``), with ``newline_stop`` at a token with a newline, or
    after ``max_new_tokens``. Every forward pass has one query row: the one that emits the next token.

    Raises:
        HeadscopeError: logits that are not numbers.
    """
    stops, emitted, fed = stop_tokens(lm), list[int](), int(last)
    length = int(cache.get_seq_length()) + 1
    while len(emitted) < max_new_tokens:
        with said_boundary(length):
            output = lm.forward(torch.tensor([[fed]]), cache=cache)
        check_finite(lm, output.logits[:, -1])
        fed = int(output.logits[0, -1].argmax())
        emitted.append(fed)
        if fed in stops or (newline_stop and "\n" in lm.tokenizer.decode([fed])):
            break
    return emitted


def said_boundary(length: int) -> AbstractContextManager[None]:
    """Says where the prompt ends, unless whoever built it does."""
    return prompt_boundary(length) if known_boundary() is None else nullcontext()


def stop_tokens(lm: LanguageModel) -> frozenset[int]:
    """Ids that end a text or a chat turn: those of the generation settings, of the configuration and of the tokenizer,
    and the special token that its chat template puts after an assistant's message."""
    tokenizer, found = lm.tokenizer, set[int]()
    for holder in (getattr(lm.inner, "generation_config", None), lm.inner.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Goodbye"}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        after = tokenizer(text.rpartition("Goodbye")[2], add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.all_special_ids:
            found.add(int(after[0]))
    return frozenset(found)


def check_finite(lm: LanguageModel, logits: torch.Tensor) -> None:
    """Raise HeadscopeError where logits (..., vocabulary) name no next token."""
    if bool(logits.isnan().any()) or not bool(logits.isfinite().any(dim=-1).all()):
        dtype = str(logits.dtype).removeprefix("torch.")
        raise HeadscopeError(
            f"{lm.name} gives logits that are not numbers in {dtype} on {logits.device}: "
            "load it with dtype='float32', or check its weights"
        )


def answer_text(lm: LanguageModel, ids: list[int]) -> str:
    """The text of emitted tokens, without special tokens and surrounding white space."""
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True)).strip()
