"""The recipe of ``llava-smollm2`` on a tiny LLaVA: packed questions are as if asked alone; what learned is kept."""

import json
import random

import pytest
import torch
from accelerate import Accelerator
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from headscope.interp.laboratory.llava import batches, training
from headscope.interp.laboratory.llava.batches import END, MIDDLE, Packing, Scenes, Segment, segments, visible
from headscope.interp.laboratory.llava.training import (
    Recipe,
    save,
    schedule,
    spoken,
    train_all,
    train_tower,
    with_updates,
)
from headscope.interp.models.llava import IMAGE_ID, add_trained
from headscope.interp.prompts.scenes.drawing import draw
from headscope.interp.prompts.scenes.world import prior_scene

VOCABULARY = 400


class Letters:
    """A tokenizer of single characters, behind the image token's id."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [20 + ord(letter) for letter in text]}


def tiny(seed=0):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=120, patch_size=12
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        image_seq_length=100,
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if ("language_model" in name or "lm_head" in name) and parameter.ndim == 2:
            parameter.data *= 4  # attention far from uniform
    return model


def test_packed_questions_are_as_if_asked_alone():
    draw_ = random.Random(1)
    scene = prior_scene(draw_, fog=0.0)
    parts, packing, model = segments(draw_, scene, captioned=True)[:4], Packing(Letters()), tiny()
    packed = {name: value[None] for name, value in packing.pack(parts, 900).items()}
    pixels = draw([scene], 2).pixels
    with torch.no_grad():
        logits, targets = spoken(model, packed, pixels)
        at = 0
        for part in parts:
            answer = packing.ids(part.answer + END)
            ids = packing.prefix + packing.ids(part.question + MIDDLE) + answer
            alone = model(input_ids=torch.tensor([ids]), pixel_values=pixels * 2 - 1).logits[0, -len(answer) - 1 : -1]
            here = slice(at, at + len(answer))
            # float32: some hundred terms of size 10 in another order
            assert (logits[here] - alone).abs().max() < 1e-3 < alone.std()
            assert targets[here].tolist() == answer
            at += len(answer)
    assert at == len(targets)


def test_what_does_not_fit_is_left_out_whole():
    packing = Packing(Letters())
    parts = [Segment("a", "b", 1.0), Segment("q" * 300, "b", 1.0), Segment("c", "d", 2.0)]
    packed = packing.pack(parts, 2 * (len(MIDDLE) + len(END) + 2))
    assert sorted(set(packed["segment"].tolist()) - {-2, -1}) == [0, 2]
    assert sorted(set(packed["weight"].tolist())) == [0.0, 1.0, 2.0]
    seen = visible(packed["segment"][None])[0, 0]
    first, last = (packed["segment"] == 0).nonzero()[0], (packed["segment"] == 2).nonzero()[-1]
    assert not seen[last, first] and seen[last, : len(packing.prefix)].all() and not seen[first, last]


def test_batches_come_back_with_their_seed():
    one, again, other = (next(iter(Scenes(Letters(), 3, 300, seed))) for seed in (4, 4, 5))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["ids"], other["ids"])


def test_the_rate_warms_up_and_falls_to_a_fiftieth():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01) and max(rates) < 1.01 and rates[-1] < 0.025
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_training_learns_and_what_it_keeps_is_what_it_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "QUESTIONS", 2)
    recipe = Recipe(tower_steps=8, tower_batch=8, steps=24, batch=3, length=300, rate=2e-2, workers=0, compiled=False)
    monkeypatch.setattr(training, "schedule", lambda step, steps, warm_up: 1.0)
    accelerator, curve = Accelerator(cpu=True), []
    model = with_updates(tiny())
    frozen = model.model.language_model.layers[0].mlp.up_proj.base_layer.weight.clone()
    train_tower(model.model.vision_tower, recipe, accelerator, lambda **line: curve.append(line))
    train_all(model, Letters(), recipe, accelerator, lambda **line: curve.append(line), lambda: None)
    tower, everything = ([line for line in curve if line["stage"] == stage] for stage in ("tower", "all"))
    assert tower[-1]["loss"] < tower[0]["loss"] and everything[-1]["answers"][0] < 0.9 * everything[0]["answers"][0]
    assert torch.equal(frozen, model.model.language_model.layers[0].mlp.up_proj.base_layer.weight)

    save(model, tmp_path, recipe, curve, "CPU")
    fresh = tiny()
    add_trained(fresh, tmp_path)
    drawn = draw([prior_scene(random.Random(3))], 1).pixels
    ids = torch.tensor([Packing(Letters()).prefix + [100, 101, 102]])
    with torch.no_grad():
        learned, kept, before = (m(input_ids=ids, pixel_values=drawn).logits for m in (model, fresh, tiny()))
    # weights are kept in float16: 2^-11 of each, some tens of them in a row
    assert (learned - kept).abs().max() < 0.02 * learned.std() < 0.2 * (learned - before).abs().max()
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["steps"] == 24
