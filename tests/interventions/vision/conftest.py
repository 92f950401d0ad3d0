"""A tiny LLaVA with grouped key/value heads, its real processor, and edits of it done by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt, vision_prompt
from headscope.interp.survey.tiny import tiny_model

LAYERS, HEADS, STEPS, IMAGE = 3, 4, 4, 16
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# layer, scores and pattern (head, query, key), the prompt's length, the stream (position, d_model) -> pattern
Hand = Callable[[int, Tensor, Tensor, int, Tensor], Tensor]


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    """LLaVA's own, for images of 32 x 32 pixels in patches of 8: 16 tokens; one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special: dict[str, Any] = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **special, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    images = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options: dict[str, Any] = dict(
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **options)


@pytest.fixture(scope="session")
def vlm(processor: LlavaProcessor) -> LanguageModel:
    """Three layers of four heads in two groups; a vision tower of two layers."""
    text = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": 32}
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": len(processor.tokenizer)}
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    more: dict[str, Any] = {"image_token_id": token, "image_token_index": token}
    made = tiny_model("llava", "image-text", text_config={**text, **sizes}, **more)
    made.get_input_embeddings().weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    made.generation_config.eos_token_id = None
    return LanguageModel.wrap(made, processor.tokenizer, name="tiny llava", revision="seed 0")


def chat(seed: int, question: str) -> list[dict[str, Any]]:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def batch(vlm: LanguageModel, processor: LlavaProcessor) -> VisionPrompt:
    """Two chats, the second padded to the left."""
    return vision_prompt(vlm, processor, [chat(0, "What is it?"), chat(1, "Why?")])


@pytest.fixture
def singles(vlm: LanguageModel, processor: LlavaProcessor) -> list[VisionPrompt]:
    """The same chats by themselves."""
    return [vision_prompt(vlm, processor, chat(0, "What is it?")), vision_prompt(vlm, processor, chat(1, "Why?"))]


@contextmanager
def by_hand(hand: Hand, length: int, streams: dict[int, Tensor]) -> Iterator[None]:
    """Inside the block llama's eager attention is dense, in float64, and gives ``hand``'s pattern."""

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query.double() @ k.transpose(2, 3) * scaling)[0]
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        p = hand(module.layer_idx, scores, scores.softmax(-1), length, streams[module.layer_idx])[None]
        return (p @ v).transpose(1, 2).to(query.dtype).contiguous(), p

    own = modeling_llama.eager_attention_forward
    try:
        modeling_llama.eager_attention_forward = eager
        yield
    finally:
        modeling_llama.eager_attention_forward = own


@pytest.fixture
def dense(vlm: LanguageModel) -> Callable[..., Tensor]:
    """Logits (step, vocabulary) of one chat without a cache, padding or anything of headscope, the whole text anew at
    every step, with attention by hand; ``tokens`` are what was generated."""
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    streams: dict[int, Tensor] = {}
    for i, layer in enumerate(model.model.language_model.layers):

        def keep(_: Any, args: tuple[Tensor, ...], i: int = i) -> None:
            streams[i] = args[0][0].double()

        layer.register_forward_pre_hook(keep)

    def run(prompt: VisionPrompt, tokens: Tensor, hand: Hand) -> Tensor:
        found = []
        length = prompt.inputs["input_ids"].shape[1]
        for step in range(len(tokens)):
            ids = torch.cat([prompt.inputs["input_ids"], tokens[None, :step]], 1)
            whole = {**prompt.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with by_hand(hand, length, streams), torch.no_grad():
                found.append(model(**whole, use_cache=False).logits[0, -1])
        return torch.stack(found)

    return run


@pytest.fixture
def generated(vlm: LanguageModel) -> Callable[..., tuple[Tensor, Tensor]]:
    """Tokens (example, step) of a greedy generation with a cache, and its logits (example, step, vocabulary)."""

    def run(prompt: VisionPrompt, steps: int = STEPS) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = dict(output_logits=True, return_dict_in_generate=True, pad_token_id=0)
        with prompt.published():
            found = vlm.model.generate(**prompt.inputs, max_new_tokens=steps, do_sample=False, **options)
        width = prompt.inputs["input_ids"].shape[1]
        return found.sequences[:, width:], torch.stack(found.logits, 1)

    return run
