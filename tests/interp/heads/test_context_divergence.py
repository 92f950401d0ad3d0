"""Divergence with and without a span: by hand, and against hooks and eager weights in float64 of the untouched model.

Tolerance: z is a weighted mean of float32 values of about 1 with weights that are good to 1e-5 (see ``test_heads``),
through two layers: 1e-4. Divergences of patterns are sums of weights times logarithms of ratios of up to about 10: 1e-4
too.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import discover
from headscope.interp.heads.divergence.context_divergence import (
    ContextDivergence,
    above_median,
    outliers,
    token_divergence,
)
from headscope.interp.heads.divergence.pattern_divergence import PatternDivergence, jensen_shannon
from headscope.interp.heads.passes import record_of
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import load_haystack
from headscope.interp.prompts.vision import VisionPrompt, vision_prompt
from headscope.interp.survey.tiny import tiny_model

NEAR = 1e-4
IDS = torch.randint(1, 690, (26,), generator=torch.Generator().manual_seed(5)).tolist()
SPANS = {"document": [(3, 8), (11, 15)], "system": [(0, 3)]}


@pytest.fixture(scope="module")
def tokenizer(byte_level) -> PreTrainedTokenizerFast:
    return byte_level(700)


@pytest.fixture
def lm(tokenizer) -> LanguageModel:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    common = dict(vocab_size=700, eos_token_id=0, bos_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=1024, **sizes, **common)
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def prompt(side: str | None = None) -> VisionPrompt:
    """One prompt of tokens, with padding on a side; spans count from its first token."""
    ids, mask = torch.tensor([IDS]), torch.ones(1, len(IDS), dtype=torch.long)
    if side is not None:
        pad = (4, 0) if side == "left" else (0, 4)
        ids, mask = (torch.nn.functional.pad(x, pad) for x in (ids, mask))
    return VisionPrompt({"input_ids": ids, "attention_mask": mask}, {name: [spans] for name, spans in SPANS.items()})


def run(model, ids, **inputs) -> tuple[np.ndarray, np.ndarray]:
    """z (layer, head, query, d_head) and patterns (layer, head, query, key) of the model in float64, eager."""
    dense = copy.deepcopy(model).double()
    dense.set_attn_implementation("eager")
    language = dense.model.language_model if hasattr(dense.model, "language_model") else dense.model
    kept = []
    for layer in language.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0][0].detach()))
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        patterns = dense(torch.tensor([list(ids)]), output_attentions=True, use_cache=False, **inputs).attentions
    count = patterns[0].shape[1]
    z = torch.stack([one.view(len(one), count, -1).transpose(0, 1) for one in kept])
    return z.numpy(), torch.cat(patterns).numpy()


def left_out(spans) -> list[int]:
    return [i for i in range(len(IDS)) if not any(first <= i < stop for first, stop in spans)]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("span", ["document", "system"])
def test_it_is_the_norm_of_what_changes_in_z(lm: LanguageModel, side: str | None, span: str) -> None:
    scores = heads.context_divergence(lm, prompts=[prompt(side)], span=span, rows=3, k=2, progress=False)
    kept = left_out(SPANS[span])
    moved = np.linalg.norm(
        run(lm.model, IDS)[0][..., -3:, :] - run(lm.model, [IDS[i] for i in kept])[0][..., -3:, :], axis=-1
    )
    np.testing.assert_allclose(scores.trials[0], moved.mean(-1), rtol=0, atol=NEAR)
    expected = np.sort(moved, axis=1)[:, 2:].sum((0, 1))  # the two largest of four heads, over layers, row by row
    np.testing.assert_allclose(scores.details[0]["t_vhd"], expected, rtol=0, atol=8 * NEAR)
    assert scores.details[0]["removed"] == [list(pair) for pair in SPANS[span]]
    assert moved.min() > 10 * NEAR


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_pattern_divergence_is_js_on_shared_keys(lm: LanguageModel, side: str | None) -> None:
    scores = heads.pattern_divergence(lm, prompts=[prompt(side)], progress=False)
    kept = left_out(SPANS["document"])
    whole = run(lm.model, IDS)[1][:, :, -1]
    p, q = whole[..., kept], run(lm.model, [IDS[i] for i in kept])[1][:, :, -1]
    p = p / p.sum(-1, keepdims=True)
    m = (p + q) / 2
    js = ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2
    np.testing.assert_allclose(scores.trials[0], js, rtol=0, atol=NEAR)
    assert scores.details[0]["span_mass"] == pytest.approx(1 - whole[..., kept].sum(-1).mean(), abs=NEAR)
    assert js.max() > 100 * NEAR


def test_the_same_run_twice_has_no_divergence(lm: LanguageModel) -> None:
    """Their check: the run with the span replaced by the one without."""
    for method in (ContextDivergence(prompts=[prompt()]), PatternDivergence(prompts=[prompt()])):
        rest = method.views(lm, method.prepare(lm)[0])[1]
        record = record_of(lm, [rest], method.statistics([rest]))
        sample = dataclasses.replace(rest, trial={**rest.trial, "removed": []})
        assert (method.reduce(lm, [sample], record, record)[0][0] == 0).all()


def test_values_scale_the_first_layers_divergence(lm: LanguageModel) -> None:
    """Their check: rows of W_V times c, |c| in the first layer's heads of that group."""
    before = heads.context_divergence(lm, prompts=[prompt()], progress=False).mean
    with torch.no_grad():
        lm.model.model.layers[0].self_attn.v_proj.weight[:8] *= -3  # heads 0 and 1
    after = heads.context_divergence(lm, prompts=[prompt()], progress=False).mean
    np.testing.assert_allclose(after[0, :2], 3 * before[0, :2], rtol=1e-4)
    np.testing.assert_allclose(after[0, 2:], before[0, 2:], rtol=1e-6)


def test_outliers_median_and_t_vhd_by_hand() -> None:
    """Mean 2, deviation sqrt(12 / 3) = 2 with n - 1: only what exceeds 4; with n it would be 3.73."""
    divergence = np.array([[1.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 5.0]])
    size = np.array([[0.0, 0.0, 0.0, 9.0], [9.0, 9.0, 9.0, 0.0]])
    assert outliers(divergence, size).tolist() == [[False, False, False, True], [False] * 4]
    close = np.array([[1.0, 1.0, 2.0, 3.94]])  # mean 1.985, deviation 1.386 (n - 1) or 1.2 (n)
    assert outliers(close, close).tolist() == [[False, False, False, True]]
    assert outliers(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]])).tolist() == [
        [False] * 3
    ]  # 3 is not above 3
    assert above_median(np.array([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]])).tolist() == [
        [False, True, False, True],
        [False, False, False, True],
    ]
    rows = np.array([[[1.0], [4.0], [2.0]], [[np.nan]] * 3, [[3.0], [0.0], [5.0]]])
    assert token_divergence(rows, 2).tolist() == [14.0]
    with pytest.raises(HeadscopeError, match="k=4 of 3 heads"):
        token_divergence(rows, 4)


def test_outliers_are_set_to_zero_where_asked(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.model.layers[0].self_attn.v_proj.weight[:8] *= 20  # heads 0 and 1 write, and move, far more
        lm.model.model.layers[0].self_attn.q_proj.weight[8:16] *= 0  # head 1 alike at every key: it moves less
    given = dict(prompts=[prompt()], progress=False)
    plain, ruled = (heads.context_divergence(lm, zero_outliers=on, **given).mean for on in (False, True))
    z0 = run(lm.model, [IDS[i] for i in left_out(SPANS["document"])])[0][..., -1, :]
    out = outliers(plain, (z0**2).sum(-1))
    assert out.any()
    np.testing.assert_array_equal(ruled, np.where(out, 0, plain))


def test_jensen_shannon_by_hand() -> None:
    p = np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    q = np.array([[0.0, 3.0], [0.5, 0.5], [1.0, 0.0]])
    found = jensen_shannon(p, q)
    assert found[:2].tolist() == [np.log(2), 0.0] and np.isnan(found[2])


def test_documents_of_the_bundle_and_of_ones_own(lm: LanguageModel) -> None:
    method = ContextDivergence(samples=2, length=40)
    for sample, rest in method.contexts(lm):
        ((first, stop),) = sample.trial["removed"]
        assert torch.equal(rest.ids, torch.cat([sample.ids[:first], sample.ids[stop:]]))
        text = lm.tokenizer.decode(sample.ids)
        assert text.endswith("Answer:") and lm.tokenizer.decode(sample.ids[first:stop]) in load_haystack() + text
    own = heads.context_divergence(lm, texts=["It rained all day.", "The sun came out."], progress=False)
    assert len(own.trials) == 2 and own.provenance["parameters"]["texts"]


def test_methods_of_the_family_share_their_passes(lm: LanguageModel) -> None:
    given = dict(samples=2, length=40)
    methods = [ContextDivergence(**given), PatternDivergence(**given)]
    alone = [discover([method], lm, progress=False)[0] for method in methods]
    passes: list[int] = []
    hook = lm.model.register_forward_hook(lambda module, args, output: passes.append(1))
    together = discover(methods, lm, progress=False)
    hook.remove()
    assert len(passes) <= 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.trials, other.trials, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": [prompt()], "span": "image"}, "no span 'image': it has document, system"),
        ({"prompts": [prompt()], "rows": 12}, "reaches into the last 12 positions"),
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [prompt()], "texts": "a"}, "give prompts or texts"),
        ({"rows": 0}, "at least 1"),
    ],
)
def test_bad_input_is_one_line(lm: LanguageModel, given: dict, said: str) -> None:
    with pytest.raises(HeadscopeError, match=said):
        heads.context_divergence(lm, progress=False, **given)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def llava():
    """A tiny random LLaVA and its processor, of images of 32 x 32 in patches of 8."""
    made = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    images = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = LlavaProcessor(images, tokens, chat_template=TEMPLATE, **options)
    model = tiny_model("llava", "image-text")
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    model.get_input_embeddings().weight.data.normal_(std=0.5)
    model.config.image_token_id = tokens.convert_tokens_to_ids("<image>")
    return model, processor


def chat(seed: int) -> list[dict]:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": content},
    ]


def test_vhd_of_images_is_theirs(llava) -> None:
    """With the image and with its tokens taken out; two images of one chat's words do not share a pass."""
    model, processor = llava
    prompts = [vision_prompt(model, processor, chat(seed)) for seed in (0, 1)]
    scores = heads.context_divergence(model, prompts=prompts, span="image", batch=2, progress=False)
    js = heads.pattern_divergence(model, prompts=prompts, span="image", progress=False)
    for i, one in enumerate(prompts):
        ids = one.inputs["input_ids"][0].tolist()
        rest = [token for token in ids if token != model.config.image_token_id]
        assert len(ids) - len(rest) == 16
        seen, patterns = run(model, ids, pixel_values=one.inputs["pixel_values"])
        blind, alone = run(model, rest)
        expected = np.linalg.norm(seen[..., -1, :] - blind[..., -1, :], axis=-1)
        np.testing.assert_allclose(scores.trials[i], expected, rtol=0, atol=NEAR)
        kept = [k for k, token in enumerate(ids) if token != model.config.image_token_id]
        wanted = jensen_shannon(patterns[:, :, -1][..., kept], alone[:, :, -1])
        np.testing.assert_allclose(js.trials[i], wanted, rtol=0, atol=NEAR)
    assert abs(scores.trials[0] - scores.trials[1]).max() > 10 * NEAR
    system = heads.context_divergence(model, prompts=prompts, span="system", progress=False)  # the image stays
    assert system.mean.shape == scores.mean.shape and abs(system.mean - scores.mean).max() > 10 * NEAR


def test_some_pictures_of_a_prompt_cannot_be_taken_out(llava) -> None:
    model, processor = llava
    both = chat(0)
    both[1]["content"].insert(0, chat(1)[1]["content"][0])
    made = vision_prompt(model, processor, both)
    with pytest.raises(HeadscopeError, match="some of the prompt's pictures"):
        heads.context_divergence(model, prompts=[made], span="image_0", progress=False)
    assert np.isfinite(heads.context_divergence(model, prompts=[made], span="image", progress=False).mean).all()


@pytest.mark.slow
def test_smollm2_reads_its_document(smollm2) -> None:
    given = dict(samples=1, length=60, progress=False)
    scores, js = heads.context_divergence(smollm2, **given), heads.pattern_divergence(smollm2, **given)
    whole, rest = ContextDivergence(samples=1, length=60).contexts(smollm2)[0]
    z, z0 = (run(smollm2.model, one.ids.tolist())[0][..., -1, :] for one in (whole, rest))
    np.testing.assert_allclose(scores.mean, np.linalg.norm(z - z0, axis=-1), rtol=1e-3, atol=1e-3)
    assert 0 <= js.mean.min() and js.mean.max() <= np.log(2) and js.details[0]["span_mass"] > 0.05
