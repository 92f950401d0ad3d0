"""Guidance and SGRS in the place of ``generate``, in padded batches, against whole passes of both streams by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.sites import is_attached
from headscope.interp.sites.inputs import example_inputs, media_tokens
from headscope.interp.statistics.spans import intervals
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import DECODINGS, Guidance, KnockOut, SaliencyRejection, apply, load_intervention
from headscope.interventions.decoding.base import Decoding

STEPS = 5


def new(vlm: LanguageModel, prompt: VisionPrompt, **options: Any) -> Tensor:
    with prompt.published():
        ids = vlm.model.generate(**prompt.inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **options)
    return ids[:, prompt.inputs["input_ids"].shape[1] :]


def hidden(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
    """The knockout of keys 1 and 2, by hand."""
    scores = scores.clone()
    scores[..., 1:3] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_guidance_is_both_streams(
    vlm: LanguageModel, batch: VisionPrompt, singles: list[VisionPrompt], dense: Any, gamma: float
) -> None:
    """The stream with the image is edited, the one without is not; each prompt of the batch for itself."""
    with apply(vlm, KnockOut(span=(1, 3)), Guidance(gamma=gamma)):
        tokens = new(vlm, batch)
    assert not is_attached(vlm.model) and tokens.shape == (2, STEPS)
    for i, prompt in enumerate(singles):
        ids = prompt.inputs["input_ids"]
        seen = dense(prompt, tokens[i], hidden).double().log_softmax(-1)
        for step in range(STEPS):
            whole = torch.cat([ids[ids != vlm.model.config.image_token_id], tokens[i, :step]])[None]
            with torch.no_grad():
                blind = vlm.model(input_ids=whole).logits[0, -1].double().log_softmax(-1)
            guided = gamma * (seen[step] - blind) + blind
            guided[seen[step] < seen[step].max() + torch.tensor(0.1).log()] = -torch.inf
            assert int(guided.argmax()) == int(tokens[i, step])
    if gamma == 1:
        with apply(vlm, KnockOut(span=(1, 3))):
            assert torch.equal(new(vlm, batch), tokens)
    else:
        with apply(vlm, KnockOut(span=(1, 3)), Guidance(gamma=1.0)):
            assert not torch.equal(new(vlm, batch), tokens)


def test_the_cut_by_hand() -> None:
    """Of p = 0.6, 0.35, 0.05 with the image and 0.6, 0.1, 0.3 without: the third lies below a tenth of the first."""
    seen, blind = torch.tensor([[0.6, 0.35, 0.05]]).log(), torch.tensor([[0.6, 0.1, 0.3]]).log()
    found = Guidance(gamma=2.0).guided(seen, blind).exp()
    assert found[0].tolist() == pytest.approx([0.6, 0.35**2 / 0.1, 0.0])
    assert Guidance(gamma=2.0, cut=0.0).guided(seen, blind).exp()[0, 2] == pytest.approx(0.05**2 / 0.3)
    assert Guidance(gamma=1.0).guided(seen, blind).exp()[0, 2] == pytest.approx(0.05)


def test_sgrs_continues_each_prompt_of_a_batch(
    vlm: LanguageModel, batch: VisionPrompt, singles: list[VisionPrompt]
) -> None:
    way = SaliencyRejection(layers=(1,), seed=3)
    with apply(vlm, way):
        tokens = new(vlm, batch)
    for i, prompt in enumerate(singles):
        with prompt.published():
            own = SaliencyRejection(layers=(1,), seed=3, max_new_tokens=STEPS).generate(vlm, prompt.inputs)
        assert list(own.ids) == tokens[i].tolist()


@pytest.mark.parametrize("name", DECODINGS)
def test_every_decoding(vlm: LanguageModel, batch: VisionPrompt, name: str, tmp_path: Path) -> None:
    made: Decoding = DECODINGS[name]()
    assert made.source and made.unit and made.kind == name == made.name and made.document({}, "")["kind"] == name
    loaded = load_intervention(made.save(tmp_path / name, vlm), vlm)
    assert loaded == made and repr(loaded) == repr(made) and hash(loaded) == hash(made)
    plain = new(vlm, batch)
    with pytest.warns(UserWarning, match="changed nothing in this block: the model's generate was not called"):
        with apply(vlm, made), torch.no_grad(), batch.published():
            vlm.model(**batch.inputs)
    assert torch.equal(new(vlm, batch), plain)
    for option, value in (("num_beams", 2), ("do_sample", True), ("num_return_sequences", 2)):
        with pytest.raises(HeadscopeError, match=option), apply(vlm, made), batch.published():
            vlm.model.generate(**batch.inputs, max_new_tokens=2, **{option: value})
    with pytest.raises(HeadscopeError, match="has no setting"):
        made.with_settings(strength=0.5)


def test_positions_in_several_dimensions() -> None:
    """Qwen2-VL places image tokens in three: both streams go on from their own, and gamma 1 is the greedy choice."""
    model = tiny_model("qwen2_vl", "image-text")
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[media_tokens(model.config)["image"]] = 0.0  # it is never chosen
    inputs = example_inputs(model, padding=False)
    inputs = {
        name: x[:1] if name != "pixel_values" else x[: int(inputs["image_grid_thw"][0].prod())]
        for name, x in inputs.items()
    }
    places = (inputs["input_ids"][0] == media_tokens(model.config)["image"]).nonzero()[:, 0].tolist()
    prompt, lm = VisionPrompt(inputs, {"image": [intervals(places)]}), load_model(model)
    plain = new(lm, prompt)
    with apply(lm, Guidance(gamma=1.0)):
        assert torch.equal(new(lm, prompt), plain)
    with apply(lm, Guidance(gamma=2.0, cut=0.0)):
        tokens = new(lm, prompt)
    assert media_tokens(model.config)["image"] not in tokens
    rest = inputs["input_ids"][inputs["input_ids"] != media_tokens(model.config)["image"]]
    for step in range(STEPS):
        ids = torch.cat([inputs["input_ids"], tokens[:, :step]], 1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, step))
        with torch.no_grad():
            whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
            seen = model(**whole).logits[:, -1]
            blind = model(input_ids=torch.cat([rest, tokens[0, :step]])[None]).logits[:, -1]
        assert int(Guidance(gamma=2.0, cut=0.0).guided(seen, blind).argmax()) == int(tokens[0, step])
    with apply(lm, SaliencyRejection(layers=(1,), candidates=1)):
        assert torch.equal(new(lm, prompt), plain)
