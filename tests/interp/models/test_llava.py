"""``llava-smollm2``, as a user gets it: by name, with its processor; it says what it sees."""

import hashlib
import json
import random

import pytest
import torch
from PIL import Image

from headscope.interp import load_model
from headscope.interp.laboratory.llava.batches import END, MIDDLE, Packing
from headscope.interp.models.available import TRAINED, available_models, llava_revision
from headscope.interp.models.processors import processor_of
from headscope.interp.prompts.scenes.drawing import draw
from headscope.interp.prompts.scenes.language import caption, named, request
from headscope.interp.prompts.scenes.world import balanced_scene
from headscope.interp.prompts.vision import vision_prompt


def test_the_weights_are_those_of_the_committed_training():
    digest = hashlib.sha256()
    for name in ("vision.safetensors", "language.safetensors"):
        digest.update((TRAINED / name).read_bytes())
    assert digest.hexdigest() == llava_revision()
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) < 20e6
    told = json.loads((TRAINED / "training.json").read_text())
    assert told["device"] == "NVIDIA H200" and told["curve"][-1]["step"] == told["recipe"]["steps"] - 1
    assert "llava-smollm2" in {model.name for model in available_models()}


@pytest.mark.slow
def test_it_loads_by_name_and_says_what_is_there():
    lm = load_model("llava-smollm2")
    scene = balanced_scene(random.Random(2), 3, 3)
    pixels = draw([scene], 1).pixels[0]
    image = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": request(detail=True)}]
    prompt = vision_prompt(lm, processor_of(lm), [{"role": "user", "content": content}])
    packing = Packing(lm.tokenizer)
    assert prompt.inputs["input_ids"][0].tolist() == packing.prefix + packing.ids(request(detail=True) + MIDDLE)
    assert torch.allclose(prompt.inputs["pixel_values"][0], pixels * 2 - 1, atol=1e-6)
    ((first, stop),) = prompt.spans["image"][0]
    assert (first, stop) == (3, 103) and packing.ids(END) == [2]
    ids = lm.model.generate(**prompt.inputs, max_new_tokens=60, do_sample=False)[
        0, prompt.inputs["input_ids"].shape[1] :
    ]
    said = lm.tokenizer.decode(ids, skip_special_tokens=True)
    true = set(named(caption(scene, detail=True)))
    assert len(true & set(named(said))) >= len(true) - 1, said  # class recall is 0.8 to 1 on the card
