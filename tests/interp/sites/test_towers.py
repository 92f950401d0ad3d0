"""Models of several towers: named sites, images one by one, windows, cross-attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as tf

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.statistics import (
    Distance,
    Entropy,
    KeyMass,
    SinkMass,
)
from headscope.interp.survey.eager import eager_weights
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace
from headscope.interventions import AblateHeads, apply

TOWERS = {
    "llava": {None: "language_model", "language": "language_model", "vision": "vision_tower"},
    "gemma3": {None: "language_model", "vision": "vision_tower"},
    "qwen2_vl": {None: "language_model", "vision": "visual"},
    "idefics3": {None: "text_model", "vision": "vision_model"},
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_chosen_by_name(name):
    model = tiny_model(name, "image-text")
    inputs = example_inputs(model)
    assert "pixel_values" in inputs
    for alias, part in TOWERS[name].items():
        with trace(model, [Entropy()], tower=alias) as tracer:
            model(**inputs)
        assert part in tracer.record.attrs["module"]
    with pytest.raises(HeadscopeError, match="no tower 'visoin'.*vision"):
        with trace(model, [Entropy()], tower="visoin"):
            raise AssertionError("the block must not be entered")
    text = {"input_ids": inputs["input_ids"][:, -8:]}
    with trace(model, [Entropy()], tower="vision") as tracer:
        model(**text)
    with pytest.raises(
        HeadscopeError, match="nothing was recorded in vision.*language|nothing was recorded.*text_model"
    ):
        _ = tracer.record


def test_images_attended_one_by_one_are_examples():
    model = tiny_model("qwen2_vl", "image-text")
    inputs = example_inputs(model)
    with trace(model, [Entropy()], tower="vision") as tracer:
        model(**inputs)
        model(**inputs)
    assert tracer.record["length"].to_numpy().tolist() == [16, 32, 16, 32]


def test_windowed_and_whole_layers_are_a_record_each():
    """Against eager weights: layer 0 attends within windows, layer 1 over whole images."""
    model = tiny_model("qwen2_5_vl", "image-text")
    inputs = example_inputs(model)
    with trace(model, [SinkMass(1), KeyMass()], tower="vision") as tracer:
        model(**inputs)
        model(**inputs)
    with eager_weights(model) as seen, torch.no_grad():
        model(**inputs)
    with pytest.raises(HeadscopeError, match=r"layers \[0\] and \[1\] of model.visual.*tracer.records.*layers=\[0\]"):
        _ = tracer.record
    windows, images = tracer.records
    assert windows["layer"].to_numpy().tolist() == [0] and images["layer"].to_numpy().tolist() == [1]
    assert images["length"].to_numpy().tolist() == [16, 32] * 2
    assert windows.sizes["example"] > images.sizes["example"]
    for layer, record in enumerate((windows, images)):
        patterns = [p[0] for name, p in seen if f"visual.blocks.{layer}." in name]
        assert [p.shape[-1] for p in patterns] * 2 == record["length"].to_numpy().tolist()
        for example, p in enumerate(patterns * 2):
            here = record.isel(example=example, layer=0)
            np.testing.assert_allclose(here["sink_mass"][:, : p.shape[1]], p[..., 0], atol=2e-5)
            np.testing.assert_allclose(here["key_mass"][:, : p.shape[2]], p.sum(1), atol=2e-4)
    with trace(model, [Entropy()], tower="vision", layers=[1]) as tracer:
        model(**inputs)
    assert tracer.record["length"].to_numpy().tolist() == [16, 32]
    with trace(model, [Entropy()]) as tracer:
        model(**inputs)
    assert len(tracer.records) == 1 and tracer.records[0].equals(tracer.record)


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_encoder_decoder_and_cross_attention_apart(name):
    model = tiny_model(name, "encoder-decoder")
    inputs = example_inputs(model, padding=False)
    with eager_weights(model) as seen, torch.no_grad():
        model(**inputs)
    cross = [p for place, p in seen if "encoder_attn" in place or "EncDec" in place]
    lengths = {}
    for site in (None, "encoder", "decoder", "cross"):
        with trace(model, [SinkMass(1), KeyMass()], tower=site) as tracer:
            model(**inputs)
        lengths[site] = (tracer.record.sizes["query"], tracer.record.sizes["key"])
    assert lengths[None] == lengths["decoder"] == (12, 12)
    assert lengths["cross"] == (12, lengths["encoder"][0])
    for layer, p in enumerate(cross):
        np.testing.assert_allclose(tracer.record["sink_mass"].sel(layer=layer), p[..., 0], atol=2e-5)
        np.testing.assert_allclose(tracer.record["key_mass"].sel(layer=layer), p.sum(2), atol=2e-4)
    with pytest.raises(HeadscopeError, match="Distance is not exact with queries and keys of different sequences"):
        with trace(model, [Distance()], tower="cross"):
            model(**inputs)


BERT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def composed(sees: bool):
    """A BERT decoder, whose modules are called ``decoder.bert.encoder...``, after a BERT or a ViT."""
    small = tf.BertConfig(**BERT, max_position_embeddings=64)
    if sees:
        eye = {key: size for key, size in BERT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
        config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**eye), small)
    else:
        config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(small, copy.deepcopy(small))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = (tf.VisionEncoderDecoderModel if sees else tf.EncoderDecoderModel)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    ids = torch.randint(3, 99, (2, 11))
    given = {"pixel_values": torch.randn(2, 3, 16, 16)} if sees else {"input_ids": ids}
    return model, {**given, "decoder_input_ids": ids[:, :7]}


@pytest.mark.parametrize("sees", [False, True])
def test_a_decoder_whose_path_says_encoder(sees):
    """Against the eager weights of a copy."""
    model, inputs = composed(sees)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        out = twin(**inputs, output_attentions=True)
    want = {"encoder": out.encoder_attentions, None: out.decoder_attentions, "cross": out.cross_attentions}
    want |= {"decoder": want[None]} | ({"vision": want["encoder"]} if sees else {})
    for tower, patterns in want.items():
        p = torch.stack(patterns, 1)
        with trace(model, [Entropy()], tower=tower) as tracer:
            model(**inputs)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
        np.testing.assert_allclose(tracer.record["entropy"], entropy, atol=2e-5)
    with trace(model, [Entropy()], tower="cross") as tracer:
        first = next(value for name, value in inputs.items() if name != "decoder_input_ids")
        model.generate(first, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
    assert tracer.record.sizes["query"] == 4


@pytest.mark.parametrize("tower", ["encoder", "decoder", None])
def test_an_edit_of_a_decoder_whose_path_says_encoder(tower):
    """Against a hook on the module that the head's output goes through."""
    model, inputs = composed(sees=False)
    part = model.encoder if tower == "encoder" else model.decoder.bert

    def zero(module, args):
        return (torch.cat([torch.zeros_like(args[0][..., :8]), args[0][..., 8:]], -1), *args[1:])

    hook = part.encoder.layer[0].attention.output.register_forward_pre_hook(zero)
    with torch.no_grad():
        want = model(**inputs)
    hook.remove()
    with apply(model, AblateHeads([(0, 0)]), tower=tower):
        got = model(**inputs)
    torch.testing.assert_close(got.logits, want.logits, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.encoder_last_hidden_state, want.encoder_last_hidden_state, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_cross_attention_while_generating(name):
    model = tiny_model(name, "encoder-decoder")
    inputs = example_inputs(model, padding=False)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :3]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 5}
    with trace(model, [Entropy()], tower="cross") as tracer:
        model.generate(**inputs, **options)
    assert tracer.record.sizes["example"] == 2
    assert tracer.record["query_position"].to_numpy().tolist() == [list(range(tracer.record.sizes["query"]))] * 2
    assert tracer.record.sizes["query"] >= 6
