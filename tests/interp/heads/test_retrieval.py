"""Retrieval scores: by hand, on attention that is known, against eager attention, and after a kill."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import HeadscopeError, HeadScores
from headscope.interp.attention.handler import Handler
from headscope.interp.heads import retrieval, retrieval_paraphrased
from headscope.interp.heads.recall.copied_needle import copy_score
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import NeedlePrompts, decode, load_haystack, load_needles, prefill
from headscope.interp.sites import attached
from headscope.interp.statistics import TopKeys
from headscope.interp.tracing.recording import trace

SETTINGS = {"lengths": [260], "depths": [50], "needles": 1, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"])
    text = load_haystack()[:20_000] + " ".join(needle.needle for needle in load_needles(10))
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _llama(tokenizer) -> LanguageModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


def test_copy_score_by_hand():
    ids, span = [9, 5, 6, 5, 7, 9], (1, 5)  # needle 5 6 5 7
    emitted = [5, 6, 5, 7, 5]
    top = np.array(
        [
            [1, 2, 3, 4, 1],  # copies every token, the first one twice over
            [3, 2, 1, 4, 0],  # the other occurrences of 5 count as well
            [2, 3, 4, 1, 2],  # always the next token: none equals the emitted one
            [0, 0, 5, 5, 5],  # outside the needle
            [1, 1, 1, 1, 1],  # right for the 5s only
            [6, 9, 7, 8, 99],  # keys after the prompt
        ]
    )
    assert copy_score(top, emitted, ids, span).tolist() == [5 / 4, 1.0, 0.0, 0.0, 3 / 4, 0.0]
    assert copy_score(top, emitted, ids, span, "set") == pytest.approx([1.0, 1.0, 0.0, 0.0, 1 / 3, 0.0])
    assert copy_score(top.reshape(2, 3, 5), emitted, ids, span).shape == (2, 3)


def test_keys_of_the_same_token_outside_the_needle_do_not_count():
    assert copy_score(np.array([[0]]), [5], [5, 5, 6], (1, 3)).tolist() == [0.0]
    assert copy_score(np.array([[1]]), [5], [5, 5, 6], (1, 3)).tolist() == [0.5]


class Aim(Handler):
    """Makes the heaviest key of every head known: keys lie on a circle by position, queries point at a chosen one."""

    def __init__(self, targets: dict[tuple[int, int], list[int]], prompt: int) -> None:
        self.targets, self.prompt = targets, prompt

    def edit(self, call):
        def angle(position: torch.Tensor) -> torch.Tensor:
            a = position.double() * (2 * math.pi / 400)
            circle = torch.zeros(*position.shape, call.query.shape[-1], dtype=torch.float64)
            circle[..., 0], circle[..., 1] = a.cos(), a.sin()
            return circle.to(call.query.dtype)

        keys = angle(torch.arange(call.key.shape[2])).expand(*call.key.shape)
        wanted = torch.zeros(call.query.shape[1], call.query.shape[2])
        for head in range(call.query.shape[1]):
            for row in range(call.query.shape[2]):
                step = call.mask.query_offset + row - (self.prompt - 1)
                path = self.targets.get((call.layer, head), [0])
                wanted[head, row] = path[step] if 0 <= step < len(path) else 0
        return call.with_(query=3e4 * angle(wanted)[None], key=keys)


def _say(lm: LanguageModel, emitted: list[int], prompt: int) -> None:
    def hook(module, args, kwargs, output):
        cache = output.past_key_values
        step = -1 if cache is None else cache.get_seq_length() - prompt
        if output.logits.shape[1] == 1 and 0 <= step < len(emitted):
            output.logits = torch.nn.functional.one_hot(torch.tensor([[emitted[step]]]), output.logits.shape[-1]) * 1.0
        return output

    lm.model.register_forward_hook(hook, with_kwargs=True)


@pytest.fixture
def scene(tokenizer):
    """A model that says the answer, its first token again, and stops; heads that look where we say."""
    lm = _llama(tokenizer)
    task = NeedlePrompts(lengths=[260], depths=[50], needles=1)
    prompt = task.build(lm, task.trials(lm)[0])
    first, stop = prompt.span
    said = [*prompt.ids[first:stop], prompt.ids[first], tokenizer.eos_token_id]
    _say(lm, said, len(prompt.ids))
    place = list(range(first, stop))
    half = len(place) // 2
    targets = {
        (0, 0): [*place, first, 0],  # copies all, the first token twice
        (0, 2): [*place[:half], *[0] * (len(place) - half), 0, 0],
        (1, 1): [p - 1 for p in place] + [0, 0],  # the token before: what a previous-token head of the needle does
        (1, 3): [0] * len(place) + [first, 0],
    }
    return lm, prompt, Aim(targets, len(prompt.ids)), half


@pytest.mark.parametrize("count", ["counter", "set"])
def test_scores_of_known_attention(scene, count):
    lm, prompt, aim, half = scene
    first, stop = prompt.span
    with attached(lm, aim):
        scores = retrieval(lm, count=count, **SETTINGS)
    answer = prompt.ids[first:stop]
    n, distinct = len(answer), len(set(answer))
    shifted = [a for a, before in zip(answer, prompt.ids[first - 1 : stop - 1], strict=True) if a == before]
    expected = np.zeros((2, 4))
    if count == "counter":
        expected[0, 0], expected[0, 2], expected[1, 1], expected[1, 3] = (n + 1) / n, half / n, len(shifted) / n, 1 / n
    else:
        expected[0, 0], expected[0, 2] = 1.0, len(set(answer[:half])) / distinct
        expected[1, 1], expected[1, 3] = len(set(shifted)) / distinct, 1 / distinct
    np.testing.assert_allclose(scores.mean, expected, rtol=1e-12)
    assert scores.method == "retrieval" and scores.top(1).heads == ((0, 0),)
    (trial,) = scores.details
    assert trial["kept"] and trial["recall"] == 1.0 and trial["response"].startswith("eat a sandwich")
    assert (trial["length"], trial["depth"], trial["tokens"], trial["position"]) == (260, 50, 260, first)


@pytest.mark.parametrize("chat", [False, True])
def test_paraphrase_control_leaves_induction_out(tokenizer, chat):
    """A head that finds the token after the last one fed (induction) scores under forced="all", never under "first"."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]" if chat else None
    lead = [0] * len(tokenizer("Answer:")["input_ids"]) if chat else []
    lm = _llama(tokenizer)
    task = NeedlePrompts(lengths=[260], depths=[50], needles=1, paraphrased=True)
    prompt = task.build(lm, task.trials(lm)[0])
    assert "Golden Gate" in prompt.text and "best thing to do in San Francisco?" not in prompt.text
    first, stop = prompt.span
    place = list(range(first, stop))
    targets = {(0, 1): [*lead, 0, *place[1:]], (1, 2): [*lead, *place]}  # induction; retrieval
    with attached(lm, Aim(targets, len(prompt.ids))):
        first_only = retrieval_paraphrased(lm, **SETTINGS)
        every = retrieval_paraphrased(lm, forced="all", **SETTINGS)
    assert first_only.method == "retrieval_paraphrased"
    expected = np.zeros((2, 4))
    expected[1, 2] = 1.0
    np.testing.assert_array_equal(first_only.mean, expected)
    assert every.mean[1, 2] == 1.0 and every.mean[0, 1] == pytest.approx((len(place) - 1) / len(place))
    assert first_only.details[0]["kept"] and first_only.details[0]["loss"] > 0


def test_trials_that_fail_are_left_out_and_none_left_is_an_error(scene):
    lm, prompt, aim, _ = scene
    with pytest.raises(HeadscopeError, match="none of 1 trials was kept"):
        retrieval(lm, threshold=1.0, **SETTINGS)  # strictly above, as the authors have it
    two = {**SETTINGS, "needles": 2}  # the model gives the first needle's answer to both questions
    with attached(lm, aim):
        scores = retrieval(lm, **two)
    assert [d["kept"] for d in scores.details] == [True, False] and scores.n.tolist() == [[1] * 4] * 2


def test_needles_are_resampled_whole(tokenizer):
    lm = _llama(tokenizer)
    settings = {**SETTINGS, "lengths": [240, 260], "depths": [0, 50], "needles": 3, "threshold": -1.0}
    by_needle = retrieval(lm, max_new_tokens=2, **settings)
    by_text = retrieval(lm, max_new_tokens=2, group="text", **settings)
    assert by_needle.n[0, 0] == 12
    assert by_needle.groups.tolist() == by_needle.groups[[0, 4, 8]].repeat(4).tolist()
    assert len(set(by_needle.groups)) == 3 and len(set(by_text.groups)) == 6


def test_sliding_windows_keep_positions(tokenizer):
    """A cache that forgets old keys must not shift the positions of the others."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=120,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    model = Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=2.0)  # sharp heads with a clear heaviest key
        torch.nn.init.normal_(layer.self_attn.k_proj.weight, std=2.0)
    lm = LanguageModel.wrap(model, tokenizer, name="tiny gemma")
    task = NeedlePrompts(lengths=[260], depths=[100], needles=1, max_new_tokens=6)
    prompt = task.build(lm, task.trials(lm)[0])
    assert prompt.span[0] > 260 - 120  # the needle is inside the window, and the window has moved
    cache = prefill(lm, prompt.ids[:-1])
    with trace(lm, [TopKeys(1)]) as tracer:
        said = decode(lm, cache, prompt.ids[-1], 6)
    ours = tracer.record["top_keys"].isel(example=0, rank=0).to_numpy()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([[*prompt.ids, *said[:-1]]]), output_attentions=True, use_cache=False)
    theirs = torch.stack([p[0, :, -len(said) :].argmax(-1) for p in output.attentions]).numpy()
    assert output.logits[0, -len(said) :].argmax(-1).tolist() == said
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("name", "value"), [("count", "bag"), ("forced", "some"), ("group", "depth")])
def test_unknown_options_are_refused(tokenizer, name, value):
    with pytest.raises(HeadscopeError, match="(count|forced|group) is '"):
        retrieval_paraphrased(_llama(tokenizer), **SETTINGS, **{name: value})


def test_a_run_is_resumed_only_with_the_same_settings(scene, tmp_path):
    lm, _, aim, _ = scene
    with attached(lm, aim):
        done = retrieval(lm, out=tmp_path, **SETTINGS)
    again = retrieval(lm, out=tmp_path, **SETTINGS)
    np.testing.assert_array_equal(again.trials, done.trials)  # read back: without Aim no head looks at the needle
    assert done.mean.max() > 1 > retrieval(lm, **SETTINGS).mean.max()
    read = HeadScores.load(tmp_path / "retrieval.json")
    np.testing.assert_array_equal(read.mean, done.mean)
    with pytest.raises(HeadscopeError, match="other settings"):
        retrieval(lm, out=tmp_path, count="set", **SETTINGS)
