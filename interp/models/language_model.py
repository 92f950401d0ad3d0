"""A language model with its tokenizer: prompts in, logits or text out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.info import ModelInfo
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.unwrap import bare_model, model_device, takes

Prompts = str | Sequence[str]
LOGITS = 1 << 30  # bytes of logits that a call computes without being asked for them


@dataclass(eq=False)
class LanguageModel:
    """A Hugging Face model and its tokenizer (None for a bare model, which is then called as ``lm.model(**inputs)``).

    ``revision`` names the weights: the hub's commit, or the SHA-256 of the source; None where nobody knows.
    ``bridge`` is the TransformerBridge whose inside ``model`` is: it computes the attention, and its hooks show it.
    ``processor`` makes inputs of chats with pictures; where it is None, ``models.processors`` finds it.
    """

    model: PreTrained
    tokenizer: Any
    name: str
    revision: str | None
    info: ModelInfo
    bridge: Any = None
    processor: Any = None

    @classmethod
    def wrap(
        cls,
        model: PreTrained,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        bridge: Any = None,
        processor: Any = None,
    ) -> LanguageModel:
        """Describe a model and give its tokenizer a padding token (an existing token) where it has none."""
        tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
        if tokenizer is not None:
            _ensure_padding(tokenizer)
        inner = bare_model(model)
        info, config = ModelInfo.from_model(inner), inner.config
        name = name or getattr(config, "name_or_path", None) or info.architecture
        return cls(model, tokenizer, name, revision or getattr(config, "_commit_hash", None), info, bridge, processor)

    def __repr__(self) -> str:
        i = self.info
        form = i.dtype if i.quantization is None else f"{i.quantization}, {i.dtype}"
        groups = "" if i.kv_heads == i.heads else f" ({i.kv_heads} KV)"
        return (
            f"LanguageModel({self.name!r}: {i.architecture}, {i.layers} layers x {i.heads} heads{groups}, "
            f"d_head {i.d_head}, context {i.context_length}, {i.parameters / 1e6:.0f}M {form} on {i.device})"
        )

    @property
    def inner(self) -> Any:
        """The transformers model inside ``model`` (another one only where an adapter's own forward is around it)."""
        return bare_model(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return model_device(self.inner)

    def __call__(self, prompts: Prompts, **kwargs: Any) -> Any:
        """Run the model on prompts, padded to the right, without gradients; returns transformers' own output.

        Right padding leaves every position where it would be without padding. Keyword arguments go to the model.
        Where the logits of all positions would take more than ``LOGITS`` bytes (8,192 tokens of Gemma 3: 8 GiB), only
        those from the end of the shortest prompt on are computed, with a warning; ``logits_to_keep=0`` means all.
        Raises HeadscopeError where a prompt is empty or too long, or where its last logits are not numbers.
        """
        inputs = self.encode(prompts)
        self._spare_logits(inputs["attention_mask"], kwargs)
        with torch.no_grad():
            output = self.model(**inputs, **kwargs)
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 3:
            self.check_finite(_last_logits(logits, inputs["attention_mask"]))
        return output

    def forward(self, ids: Tensor, *, logits: int = 0, cache: Any = False, **inputs: Any) -> Any:
        """Run the model on token ids (batch, length), without gradients; returns transformers' own output.

        Args:
            ids: on any device.
            logits: compute those of the last so many positions only, where the model can; 0: all.
            cache: False: keep none; True: make one; a cache of an earlier pass: continue it.
            inputs: whatever else the model takes.
        """
        options: dict[str, Any] = {"use_cache": cache is not False}
        if logits:
            options["logits_to_keep"] = logits
        if not isinstance(cache, bool):
            options["past_key_values"] = cache
        model = self.inner
        if "past_key_values" in options and not takes(model, "past_key_values"):
            raise HeadscopeError(f"{self.name} keeps no cache, so it cannot go on from one; give it the whole text")
        taken = {name: value for name, value in options.items() if takes(model, name)}
        with torch.no_grad():
            return self.model(input_ids=ids.to(self.device), **taken, **inputs)

    def encode(self, prompts: Prompts, *, padding_side: str = "right", max_new_tokens: int = 0) -> Any:
        """Token ids and attention mask (a BatchEncoding on the model's device), with the tokenizer's special tokens."""
        tokenizer = self.required_tokenizer()
        texts = _texts(prompts)
        batch = tokenizer(
            texts, padding=True, padding_side=padding_side, return_attention_mask=True, return_tensors="pt"
        )
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        limit = self.info.context_length
        for index, length in enumerate(lengths):
            if length == 0:
                raise HeadscopeError(f"prompt {index} has no tokens after tokenization: give a prompt with text in it")
            if limit is not None and length + max_new_tokens > limit:
                new = f" and {max_new_tokens} new ones" if max_new_tokens else ""
                raise HeadscopeError(
                    f"prompt {index} has {length} tokens{new}, more than the context of {self.name} ({limit}): "
                    "shorten it or take a model with a longer context"
                )
        if not takes(self.inner, "token_type_ids"):
            batch.pop("token_type_ids", None)  # a generic tokenizer makes them for every model
        return batch.to(self.device)

    def generate(self, prompts: Prompts, max_new_tokens: int = 32, **kwargs: Any) -> list[str]:
        """The text that the model adds to each prompt, greedily unless ``kwargs`` (of transformers) say otherwise."""
        inputs = self.encode(prompts, padding_side="left", max_new_tokens=max_new_tokens)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        if not kwargs.get("do_sample", False):
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        options |= kwargs
        checks = [*options.pop("logits_processor", []), self._check_scores]
        with torch.no_grad():
            output = self.model.generate(**inputs, **options, logits_processor=checks)
        ids = output if isinstance(output, Tensor) else output.sequences
        new = ids if self.inner.config.is_encoder_decoder else ids[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def chat(self, question: str, *, system: str | None = None) -> str:
        """The prompt that asks the question through the tokenizer's chat template, ready for ``lm(...)``.

        A beginning-of-sequence token that the tokenizer adds by itself is left out, so that it does not come twice.
        """
        tokenizer = self.required_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise HeadscopeError(f"{self.name} has no chat template: use a plain prompt, or an instruction-tuned model")
        _check_texts([question])
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": question})
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
        if bos is not None and tokenizer("a")["input_ids"][:1] == [bos_id]:
            text = text.removeprefix(bos)
        return text

    def required_tokenizer(self) -> Any:
        """The tokenizer; a HeadscopeError where the model came without one."""
        if self.tokenizer is None:
            raise HeadscopeError(f"{self.name} was given without a tokenizer: pass tokenizer= to load_model")
        return self.tokenizer

    def _spare_logits(self, attention_mask: Tensor, kwargs: dict[str, Any]) -> None:
        """Have the model compute few logits where all would take too much memory and nobody said which."""
        batch, length = attention_mask.shape
        needed = batch * length * self.info.vocab_size * getattr(torch, self.info.dtype).itemsize
        if needed <= LOGITS or {"logits_to_keep", "labels"} & set(kwargs):
            return
        if not takes(self.inner, "logits_to_keep"):
            return
        kwargs["logits_to_keep"] = keep = 1 + length - int(attention_mask.sum(1).min())
        warnings.warn(
            f"the logits of {batch} x {length} tokens over {self.info.vocab_size} words would take "
            f"{needed / 2**30:.1f} GiB: only those of the last {keep} positions are computed; pass logits_to_keep=0 "
            "for all, or another number to choose",
            stacklevel=3,
        )

    def _check_scores(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.check_finite(scores)
        return scores

    def check_finite(self, logits: Tensor) -> None:
        """Raise HeadscopeError where logits (any, vocab) are not numbers."""
        # A model may forbid tokens with -inf; one that forbids every token is broken as well.
        bad = logits.isnan() | logits.isposinf()
        if bool(bad.any()) or not bool(logits.isfinite().any(dim=-1).all()):
            dtype = self.info.dtype
            way = "its weights are broken" if dtype == "float32" else "load it with dtype='float32'"
            raise HeadscopeError(f"{self.name} gives logits that are not numbers in {dtype} on {logits.device}: {way}")


def _texts(prompts: Any) -> list[str]:
    """Prompts as a list of strings.

    Raises:
        HeadscopeError: something else, or nothing; it says what to call instead.
    """
    kind, ways = type(prompts).__name__, "give a string or a list of strings"
    if isinstance(prompts, str):
        texts = [prompts]
    elif isinstance(prompts, Mapping):
        raise HeadscopeError(f"{kind} holds a model's inputs, not text: {ways}, or call lm.model(**inputs)")
    elif hasattr(prompts, "dtype") and getattr(prompts.dtype, "kind", "i") not in "UOT":
        raise HeadscopeError(
            f"a {kind} is no text: {ways}; for token ids (batch, length) call lm.forward(ids) or "
            "lm.model(input_ids=ids)"
        )
    elif isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise HeadscopeError(f"{kind} is no prompt: {ways}")
    else:
        texts = list(prompts)
    _check_texts(texts)
    return texts


def _check_texts(texts: Sequence[Any]) -> None:
    if not texts:
        raise HeadscopeError("no prompt was given: pass a string or a list of strings")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise HeadscopeError(
                f"prompt {index} is {type(text).__name__}, not text: give strings; for token ids (batch, length) call "
                "lm.forward(torch.tensor(ids)) or lm.model(input_ids=...)"
            )
        if not text:
            raise HeadscopeError(f"prompt {index} is empty: give a prompt with text in it")


def _last_logits(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Each prompt's last logits, from all positions' or the last ones'; the first kept where its own are not."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    left_out = attention_mask.shape[1] - logits.shape[1]
    return logits[rows, (attention_mask.to(logits.device).sum(dim=1) - 1 - left_out).clamp(min=0)]


def _ensure_padding(tokenizer: Any) -> None:
    """Let an existing token stand for padding (the attention mask hides it): the vocabulary does not change."""
    if tokenizer.pad_token is None:
        token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        tokenizer.pad_token = token or tokenizer.convert_ids_to_tokens(0)
