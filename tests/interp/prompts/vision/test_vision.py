"""Spans of chats with images: from real processors, statistics on them against eager weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary
from headscope.interp.prompts.vision import VisionPrompt, vision_prompt
from headscope.interp.sites.towers import parse_name, tower_of
from headscope.interp.statistics import SpanMass
from headscope.interp.statistics.spans import OPEN
from headscope.interp.survey.eager import eager_weights
from headscope.interp.tracing.recording import trace

EPS = torch.finfo(torch.float32).eps


def chat(*pictures, system="Be brief.", question=" What is this? "):
    said = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    content = [{"type": "image", "image": one} for one in pictures]
    return [*said, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def covered(spans) -> list[int]:
    return [i for first, stop in spans for i in range(first, min(stop, 1000))]


def real_ids(prompt) -> list[list[int]]:
    pairs = zip(prompt.inputs["input_ids"], prompt.inputs["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def test_spans_are_what_the_processor_wrote(built, picture):
    model, made = built
    prompt = vision_prompt(model, made, [chat(picture(0)), chat(picture(1), picture(2, 64, 40), system=None)])
    token = made.tokenizer.convert_tokens_to_ids(made.tokenizer.image_token)
    decode = made.tokenizer.decode
    for b, ids in enumerate(real_ids(prompt)):
        at = {name: covered(spans[b]) for name, spans in prompt.spans.items()}
        assert decode([ids[i] for i in at["system"]]) == ("Be brief." if b == 0 else "")
        assert decode([ids[i] for i in at["instruction"]]) == "What is this?"
        assert at["image"] == [i for i, one in enumerate(ids) if one == token]
        images = [at[f"image_{i}"] for i in range(1 + b)]
        assert sorted(sum(images, [])) == at["image"] and all(images)
        assert images == sorted(images)
        assert prompt.spans["response"][b] == [(len(ids), OPEN)]
    assert prompt.spans["image_1"][0] == []


def test_an_image_in_rows_is_several_intervals(vision_model, picture):
    model, made = vision_model("idefics3")
    spans = vision_prompt(model, made, chat(picture(0, 64, 64))).spans
    first, stop = spans["image_0"][0][0]
    assert len(spans["image_0"][0]) == 5 and stop - first == 4  # two rows of two tiles, and the whole
    alone = vision_prompt(model, made, chat(picture(0), picture(1))).spans
    assert [len(alone[f"image_{i}"][0]) for i in range(2)] == [5, 5] and len(alone["image"][0]) == 10


def test_mass_on_spans_equals_eager(built, picture):
    """A sum of up to 100 weights of float32 softmax: 100 roundings of 16 eps, as in test_architectures."""
    model, made = built
    prompt = vision_prompt(model, made, [chat(picture(0)), chat(picture(1), question="Which colours?")])
    with trace(model, [SpanMass(prompt.spans)]) as tracer:
        model(**prompt.inputs, use_cache=False)
    with eager_weights(model) as seen, torch.no_grad():
        model(**prompt.inputs, use_cache=False)
    weights = {parse_name(name, None)[1]: p for name, p in seen if tower_of(name, model) == "language"}
    assert sorted(weights) == tracer.record["layer"].to_numpy().tolist()
    token = made.tokenizer.convert_tokens_to_ids(made.tokenizer.image_token)
    for b, ids in enumerate(real_ids(prompt)):
        real = prompt.inputs["attention_mask"][b].bool()
        wanted = {
            "image": [i for i, one in enumerate(ids) if one == token],
            **{name: covered(prompt.spans[name][b]) for name in ("system", "instruction")},
        }
        for layer, p in weights.items():
            p = p[b][:, real][:, :, real].double()
            for name, at in wanted.items():
                got = tracer.record["span_mass"].sel(example=b, layer=layer, span=name)[:, : len(ids)]
                np.testing.assert_allclose(got, p[..., at].sum(-1), atol=1600 * EPS, err_msg=name)
                assert float(p[..., at].sum(-1).max()) > 0.05, "too little mass for this test to notice a mistake"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_of_a_video_are_a_span(vision_model, picture, name):
    """Two frames and two by two patches are a token; a picture in the same chat is another span."""
    model, made = vision_model(name)
    frames, image = [picture(i, 32, 32) for i in range(4)], {"type": "image", "image": picture(9, 32, 32)}

    def read(video):
        parts = [{"type": "video", "video": video}, image, {"type": "text", "text": "?"}]
        return vision_prompt(model, made, [{"role": "user", "content": parts}])

    prompt = read(frames)
    ids = prompt.inputs["input_ids"][0].tolist()
    token = made.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    spans = {kind: covered(prompt.spans[kind][0]) for kind in ("video", "video_0", "image")}
    assert spans["video"] == spans["video_0"] == [i for i, one in enumerate(ids) if one == token]
    assert len(spans["video"]) == 2 * 2 * 2 and len(spans["image"]) == 2 * 2
    with prompt.published(), trace(model, SpanMass({kind: kind for kind in ("video", "image")})) as tracer:
        model(**prompt.inputs, use_cache=False)
    with eager_weights(model) as seen, torch.no_grad():
        model(**prompt.inputs, use_cache=False)
    weights = {parse_name(where, None)[1]: p for where, p in seen if tower_of(where, model) == "language"}
    assert weights and sorted(weights) == tracer.record["layer"].to_numpy().tolist()
    for layer, p in weights.items():
        got = tracer.record["span_mass"].sel(example=0, layer=layer)
        for kind in ("video", "image"):  # as in test_mass_on_spans_equals_eager
            wanted = p[0][..., spans[kind]].double().sum(-1)
            np.testing.assert_allclose(got.sel(span=kind), wanted, atol=1600 * EPS)
            assert float(wanted.max()) > 0.05
    assert torch.equal(read(np.stack(frames)).inputs["pixel_values_videos"], prompt.inputs["pixel_values_videos"])
    for given, why in (
        ("a.mp4", "given by its frames"),
        ([], "given by its frames"),
        ([picture(0, 32, 32), picture(1, 64, 32)], "differ in size"),
    ):
        with pytest.raises(HeadscopeError, match=why):
            vision_prompt(model, made, [{"role": "user", "content": [{"type": "video", "video": given}]}])
    with pytest.raises(HeadscopeError, match="without its video"):
        vision_prompt(model, made, [{"role": "user", "content": [{"type": "video"}]}])


def test_a_chat_publishes_its_spans_and_its_end(vision_model, picture):
    """By name is by position; and the end is where generation begins, on either side of the padding."""
    model, made = vision_model("llava")
    prompt = vision_prompt(model, made, [chat(picture(0)), chat(picture(1), question="Which colours?")])
    spans = {name: prompt.spans[name] for name in ("image", "instruction")}
    with trace(model, [SpanMass(spans)]) as expected:
        model(**prompt.inputs, use_cache=False)
    with trace(model, [SpanMass({name: name for name in spans})]) as tracer, prompt.published():
        known = known_boundary()
        model(**prompt.inputs, use_cache=False)
    np.testing.assert_array_equal(tracer.record["span_mass"], expected.record["span_mass"])
    lengths = prompt.inputs["attention_mask"].sum(-1).tolist()
    assert known is not None and len(set(lengths)) == 2
    assert known.lengths == ((prompt.inputs["input_ids"].shape[1],) if known.padded else tuple(lengths))
    other = VisionPrompt({name: x.flip(1) for name, x in prompt.inputs.items() if x.dim() == 2}, prompt.spans)
    with other.published():
        assert known_boundary() != known and known_boundary() is not None


def test_the_response_of_a_chat_that_holds_it_and_of_one_that_is_generated(vision_model, picture):
    model, made = vision_model("llava")
    told = [*chat(picture(0)), {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    prompt = vision_prompt(model, made, told, add_generation_prompt=False)
    ids = real_ids(prompt)[0]
    assert made.tokenizer.decode([ids[i] for i in covered(prompt.spans["response"][0])]) == "A cat."
    open_ended = vision_prompt(model, made, chat(picture(0)))
    with trace(model, [SpanMass(open_ended.spans)]) as tracer:
        model.generate(**open_ended.inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    record = tracer.record
    n = int(record["prompt_length"][0])
    mass = record["span_mass"].sel(span="response")[0]
    assert n == len(real_ids(open_ended)[0]) and record.sizes["query"] == n + 4
    assert float(mass[..., :n].max()) == 0.0 and float(mass[..., n:].min()) > 0.0


def test_template_words_are_not_taken_for_the_users(vision_model, picture):
    model, made = vision_model("llava")
    prompt = vision_prompt(model, made, chat(picture(0), system="user", question="system"))
    ids = real_ids(prompt)[0]
    assert prompt.spans["system"][0] == [(len("<|system|>"), len("<|system|>user"))]
    first, stop = prompt.spans["instruction"][0][0]
    assert made.tokenizer.decode(ids[first - 1 : stop]) == "\nsystem"


def test_what_cannot_be_placed_is_refused(vision_model, picture, template):
    model, made = vision_model("llava")
    real = made.tokenizer
    assert vision_prompt(model, made, chat(picture(0))).inputs and made.tokenizer is real
    bare = copy.copy(made)
    bare.chat_template = None
    with pytest.raises(HeadscopeError, match="no chat template.*chat_template="):
        vision_prompt(model, bare, chat(picture(0)))
    assert vision_prompt(model, bare, chat(picture(0)), chat_template=template).spans
    for other, why in (
        (template.replace("| trim", "| upper"), "rewrites"),
        (template.replace("{{ c['text'] | trim }}", ""), "leaves out or repeats"),
    ):
        with pytest.raises(HeadscopeError, match=why):
            vision_prompt(model, made, chat(picture(0)), chat_template=other)
    with pytest.raises(HeadscopeError, match="refuses this chat.*no images were passed"):
        vision_prompt(model, made, chat(question="What is <image>?"))
    model.config.image_token_id = made.tokenizer.convert_tokens_to_ids("<eos>")  # another model's processor
    with pytest.raises(HeadscopeError, match="2 image tokens and the processor accounts for 0"):
        vision_prompt(model, made, chat(picture(0), question="b"))
    with pytest.raises(HeadscopeError, match="at least one message"):
        vision_prompt(model, made, [])
    for who, given, said in (
        (made.tokenizer, chat(picture(0)), "is no processor of images and text: give the model's"),
        (made, "What is it?", "a chat is a list of messages, not str"),
        (made, [{"content": "What is it?"}], "message 0 of the chat has no role"),
        (made, [{"role": "user", "content": None}], "a text or a list of parts"),
    ):
        with pytest.raises(HeadscopeError, match=said):
            vision_prompt(model, who, given)
