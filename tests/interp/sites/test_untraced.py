"""What is traced is what the model computes untraced, also where transformers makes no mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def paligemma(implementation: str) -> Any:
    text = GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=16, vocab_size=200)
    sight = {"image_size": 32, "patch_size": 8, "projection_dim": 64}
    vision = SiglipVisionConfig(**{**SIZES, "num_hidden_layers": 1}, **sight)
    config = PaliGemmaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=199,
        projection_dim=64,
        hidden_size=64,
    )
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():  # large enough that what is seen matters
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "left_out", [(), ("token_type_ids",), ("attention_mask",), ("token_type_ids", "attention_mask")]
)
def test_paligemma_on_text_with_and_without_optional_inputs(implementation: str, left_out: tuple[str, ...]) -> None:
    """Under SDPA without padding transformers makes no mask, and the model's flag says bidirectional."""
    model = paligemma(implementation)
    ids = torch.randint(3, 150, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs = {name: x for name, x in inputs.items() if name not in left_out}
    with torch.no_grad():
        plain = model(**inputs).logits
    with trace(model, [Entropy()]) as tracer:
        traced = model(**inputs).logits
    assert float((traced - plain).abs().max()) < 1e-4 * float(plain.abs().max())
    first = float(tracer.record["entropy"].isel(query=0, layer=0).max())
    with torch.no_grad():
        changed = ids.clone()
        changed[:, -1] = 7
        moved = float((model(**{**inputs, "input_ids": changed}).logits[:, 0] - plain[:, 0]).abs().max())
    assert (first > 0.1) == (moved > 0.0)  # its first query sees more than itself if its logits follow the last token


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2", "qwen2"])
def test_models_without_an_attention_mask(name: str) -> None:
    model, ids = tiny_model(name), torch.randint(5, 60, (2, 40))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    with trace(model, [Entropy()]):
        traced = model(input_ids=ids).logits
    assert float((traced - plain).abs().max()) < 1e-4 * float(plain.abs().max())


def test_code_around_attention_that_asks_for_a_mask_is_refused() -> None:
    """Moonshine's decoder is causal by a flag where it has no mask; ours stands there, and the flag would be off."""
    model = tiny_model("moonshine", "encoder-decoder")
    with pytest.raises(HeadscopeError, match="code around it asks whether there is a mask") as error:
        with trace(model, [Entropy()]):
            pass
    assert "\n" not in str(error.value)


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones() -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8]])
    inner = model.model.embed_tokens
    handle = inner.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    with trace(model, [Entropy()]) as tracer:
        model(input_ids=ids)
    handle.remove()
    assert tracer.record.sizes["query"] == 4
